"""A request's images, mask and control images: decoded, checked against each other and fitted to the generated size."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict
from PIL import Image

from fanlight.common.v1 import common_pb2
from fanlight.contract import limits
from fanlight.contract.generation import INPAINT_CONTROLNET, strength_of
from fanlight.contract.images import data_of, images_of
from fanlight.contract.names import digest_of
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from services.diffusion.engine.generation import ControlInput, Start
from services.diffusion.images import MASK_THRESHOLD, Resize, fit, fit_mask
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.kernel.images import ImageLimits, decode_rgb, decode_rgba


def decode(image: common_pb2.ImageSource, field: str, limits: ImageLimits) -> Image.Image:
    return decode_rgb(data_of(image, field), field=field, limits=limits)


def decode_with_hole(
    image: common_pb2.ImageSource, field: str, limits: ImageLimits
) -> tuple[Image.Image, Image.Image | None]:
    """RGB, and a mask that is white where the image is transparent; None where all of it is opaque."""
    whole = decode_rgba(data_of(image, field), field=field, limits=limits)
    hole = whole.getchannel("A").point(lambda alpha: 255 if alpha < MASK_THRESHOLD else 0)
    return whole.convert("RGB"), hole if hole.getbbox() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """`image` and `mask` of a request at their own size; None for what it lacks."""

    image: Image.Image | None
    mask: Image.Image | None


def sources(request: diffusion_pb2.GenerateRequest, limits: ImageLimits) -> Sources:
    image = decode(request.image, "image", limits) if request.HasField("image") else None
    mask = decode(request.mask, "mask", limits) if request.HasField("mask") else None
    if mask is not None and image is not None and mask.size != image.size:
        sizes = [f"{side.width} x {side.height}" for side in (mask, image)]
        raise InvalidField(f"is {sizes[0]} pixels, the image {sizes[1]}; they must have one size", field="mask")
    return Sources(image=image, mask=mask)


def start_of(
    request: diffusion_pb2.GenerateRequest, own: Sources, size_px: tuple[int, int], how: Resize, *, is_masked: bool
) -> Start:
    assert own.image is not None
    strength = strength_of(request)
    assert strength is not None, "the pipeline starts from an image"
    return Start(
        image=fit(own.image, size_px, how),
        strength=strength,
        mask=fit_mask(own.mask, size_px, how) if is_masked and own.mask is not None else None,
    )


def digests_of_images(request: diffusion_pb2.GenerateRequest) -> Iterator[tuple[str, str]]:
    """By field, of the encoded images that were sent."""
    for field, image in images_of(request):
        yield field, digest_of(data_of(image, field))


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReader:
    """A request's controls: which ControlNets, on what images, how strongly."""

    catalog: ModelCatalog
    checkpoint: CheckpointEntry
    picture_limits: ImageLimits
    how: Resize

    def nets(self, request: diffusion_pb2.GenerateRequest) -> list[ControlNetEntry]:
        nets = []
        for number, control in enumerate(request.controls):
            try:
                nets.append(self.catalog.controlnet(control.controlnet, self.checkpoint))
            except FanlightError as error:
                raise error.within(f"controls[{number}]") from error
        return nets

    def controls(
        self,
        request: diffusion_pb2.GenerateRequest,
        nets: list[ControlNetEntry],
        own: Sources,
        size_px: tuple[int, int],
    ) -> tuple[ControlInput, ...]:
        controls = []
        for number, (control, net) in enumerate(zip(request.controls, nets, strict=True)):
            try:
                controls.append(self._control(control, net, own, size_px))
            except FanlightError as error:
                raise error.within(f"controls[{number}]") from error
        return tuple(controls)

    def _control(
        self, control: diffusion_pb2.Control, net: ControlNetEntry, own: Sources, size_px: tuple[int, int]
    ) -> ControlInput:
        image, hole = self._image(control, net, own)
        return ControlInput(
            controlnet=net,
            scale=control.scale if control.HasField("scale") else limits.DEFAULT_CONTROL_SCALE,
            start=control.start if control.HasField("start") else limits.DEFAULT_CONTROL_START,
            end=control.end if control.HasField("end") else limits.DEFAULT_CONTROL_END,
            image=fit(image, size_px, self.how),
            mask=fit_mask(_hole(image, hole, own), size_px, self.how) if net.id == INPAINT_CONTROLNET else None,
            annotator=control.made_by.annotator,
            annotator_parameters=_parameters(control.made_by),
        )

    def _image(
        self, control: diffusion_pb2.Control, net: ControlNetEntry, own: Sources
    ) -> tuple[Image.Image, Image.Image | None]:
        """The control image, and for the inpaint net which of its pixels are transparent."""
        if control.HasField("image") and net.id == INPAINT_CONTROLNET:
            return decode_with_hole(control.image, "image", self.picture_limits)
        if control.HasField("image"):
            return decode(control.image, "image", self.picture_limits), None
        if net.id == INPAINT_CONTROLNET and own.image is not None:
            return own.image, None
        raise InvalidField("is missing; a ControlNet conditions on an image", field="image")


def _parameters(use: diffusion_pb2.AnnotatorUse) -> str:
    parameters = MessageToDict(use.parameters)
    return json.dumps(parameters, sort_keys=True) if parameters else ""


def _hole(image: Image.Image, hole: Image.Image | None, own: Sources) -> Image.Image:
    """What to fill in: the request's mask, or else the control image's transparent pixels."""
    if own.mask is None:
        if hole is None:
            raise InvalidField(
                "needs a mask, or a control image that is transparent where it is to fill in", field="controlnet"
            )
        return hole
    if image.size != own.mask.size:
        raise InvalidField(f"is {image.width} x {image.height} pixels; must have the mask's size", field="image")
    return own.mask
