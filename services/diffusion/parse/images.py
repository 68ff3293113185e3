"""A request's images, mask and control images: decoded, checked against each other and fitted to the generated size."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.json_format import MessageToDict
from PIL import Image, ImageChops, ImageOps

from fanlight.common.v1 import common_pb2
from fanlight.contract import limits
from fanlight.contract.generation import INPAINT_CONTROLNET, strength_of
from fanlight.contract.images import data_of, images_of
from fanlight.contract.masks import (
    BLURRED,
    ORIGINAL,
    check_pasted,
    is_alike,
    mask_blur_of,
    mask_padding_of,
    refuse_mask,
    sides_of,
)
from fanlight.contract.names import digest_of
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from services.diffusion.canvas import Canvas
from services.diffusion.engine.generation import ControlInput, Start
from services.diffusion.images import MASK_THRESHOLD, Resize, fit
from services.diffusion.masks import WHITE, filled, on_white, read_mask, transparency
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.kernel.images import ImageLimits, decode_rgb, decode_rgba

_BLACK_OR_WHITE = [WHITE if value >= MASK_THRESHOLD else 0 for value in range(256)]


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
    """`image` and `mask` of a request at their own size, which is the same; None for what it lacks."""

    image: Image.Image | None
    # What is replaced, whatever it comes from.
    mask: Image.Image | None


def sources(request: diffusion_pb2.GenerateRequest, limits: ImageLimits) -> Sources:
    if not request.HasField("image"):
        return Sources(image=None, mask=None)
    if not request.mask_from_alpha:
        image = decode(request.image, "image", limits)
        # New sides are a mask too: of the image itself nothing is masked then.
        black = Image.new("L", image.size) if sides_of(request) else None
        return Sources(image=image, mask=_mask(request, image.size, limits) or black)
    rgba = decode_rgba(data_of(request.image, "image"), field="image", limits=limits)
    mask, hole = _mask(request, rgba.size, limits), transparency(rgba)
    if mask is None and request.mask_invert:
        hole = ImageOps.invert(hole)
    return Sources(image=on_white(rgba), mask=hole if mask is None else ImageChops.lighter(mask, hole))


def _mask(request: diffusion_pb2.GenerateRequest, size_px: tuple[int, int], limits: ImageLimits) -> Image.Image | None:
    """The request's mask at the image's size."""
    if not request.HasField("mask"):
        return None
    mask = read_mask(decode_rgba(data_of(request.mask, "mask"), field="mask", limits=limits))
    if mask.size != size_px:
        if not is_alike(mask.size, size_px):
            raise refuse_mask(mask.size, size_px)
        mask = mask.resize(size_px, Image.Resampling.BILINEAR)
    return ImageOps.invert(mask) if request.mask_invert else mask


def canvas_of(
    request: diffusion_pb2.GenerateRequest, own: Sources, size_px: tuple[int, int], how: Resize, *, size_step_px: int
) -> Canvas | None:
    """None without an image. TooLarge for a result that would be."""
    if own.image is None:
        return None
    sides = sides_of(request).filling(own.image.size, size_px, size_step_px)
    if request.only_masked:
        check_pasted(own.image.size, sides)
    return Canvas(
        image=own.image,
        mask=own.mask,
        sides=sides,
        size_px=size_px,
        how=how,
        only_masked=request.only_masked,
        padding_px=mask_padding_of(request),
        blur_px=mask_blur_of(request),
    )


def start_of(request: diffusion_pb2.GenerateRequest, canvas: Canvas | None, *, is_masked: bool) -> Start:
    assert canvas is not None
    strength = strength_of(request)
    assert strength is not None, "the pipeline starts from an image"
    if not is_masked:
        return Start(image=canvas.start, strength=strength)
    mask = canvas.start_mask
    return Start(
        image=filled(canvas.start, mask) if request.mask_fill == BLURRED else canvas.start,
        strength=strength,
        mask=mask,
        fill=request.mask_fill or ORIGINAL,
        paste=canvas.paste(),
    )


def mask_options(request: diffusion_pb2.GenerateRequest, *, is_masked: bool) -> dict[str, object]:
    """Those whose defaults hold only where something is masked."""
    if not is_masked:
        return {}
    padding = mask_padding_of(request) if request.only_masked else None
    return {"mask_blur": mask_blur_of(request), "mask_padding": padding}


def mask_warnings(canvas: Canvas | None, *, is_masked: bool) -> list[str]:
    if canvas is None or not is_masked or canvas.whole_mask.getbbox() is not None:
        return []
    return ["The mask says to replace nothing, so that the result is the image itself."]


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
    # For controls that choose none.
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
        canvas: Canvas | None,
        size_px: tuple[int, int],
    ) -> tuple[ControlInput, ...]:
        controls = []
        for number, (control, net) in enumerate(zip(request.controls, nets, strict=True)):
            try:
                controls.append(self._control(control, net, own, ControlFrame(canvas, size_px)))
            except FanlightError as error:
                raise error.within(f"controls[{number}]") from error
        return tuple(controls)

    def _control(
        self, control: diffusion_pb2.Control, net: ControlNetEntry, own: Sources, frame: "ControlFrame"
    ) -> ControlInput:
        image, hole = self._image(control, net, own)
        how = Resize(control.resize or self.how)
        return ControlInput(
            controlnet=net,
            scale=control.scale if control.HasField("scale") else limits.DEFAULT_CONTROL_SCALE,
            start=control.start if control.HasField("start") else limits.DEFAULT_CONTROL_START,
            end=control.end if control.HasField("end") else limits.DEFAULT_CONTROL_END,
            image=frame.image(image, how, is_own=image is own.image),
            mask=frame.mask(_hole(image, hole, own), how, own) if net.id == INPAINT_CONTROLNET else None,
            annotator=control.made_by.annotator,
            annotator_parameters=_parameters(control.made_by),
            resize=control.resize,
            mode=control.mode,
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


class ControlFrame(NamedTuple):
    """What control images are cut to."""

    canvas: Canvas | None
    size_px: tuple[int, int]

    def image(self, image: Image.Image, how: Resize, *, is_own: bool) -> Image.Image:
        """`is_own`: the control image is the request's own image."""
        if self.canvas is None:
            return fit(image, self.size_px, how)
        return self.canvas.start if is_own else self.canvas.place(image, how)

    def mask(self, hole: Image.Image, how: Resize, own: Sources) -> Image.Image:
        """What the net fills in, black and white."""
        if self.canvas is not None and hole is own.mask:
            return self.canvas.start_mask.point(_BLACK_OR_WHITE)
        if self.canvas is not None and self.canvas.is_cut:
            return self.canvas.place(hole, how).point(_BLACK_OR_WHITE)
        return fit(hole, self.size_px, how, padding=WHITE).point(_BLACK_OR_WHITE)


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
