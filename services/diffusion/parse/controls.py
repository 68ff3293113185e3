"""A request's controls: which ControlNets, on what, how strongly, and what each net wants for itself."""

import json
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict
from PIL import Image

from fanlight.contract import limits
from fanlight.contract.generation import INPAINT_CONTROLNET
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from services.diffusion.generation import Control
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.parse.pictures import Sources, decoded, decoded_with_hole
from services.diffusion.pictures.fit import Resize, fit, fit_mask
from services.kernel.pictures import PictureLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReader:
    catalogue: Catalogue
    checkpoint: CheckpointEntry
    picture_limits: PictureLimits
    how: Resize

    def nets(self, request: diffusion_pb2.GenerateRequest) -> list[ControlNetEntry]:
        nets = []
        for number_, control in enumerate(request.controls):
            try:
                nets.append(self.catalogue.controlnet(control.controlnet, self.checkpoint))
            except FanlightError as error:
                raise error.within(f"controls[{number_}]") from error
        return nets

    def controls(
        self,
        request: diffusion_pb2.GenerateRequest,
        nets: list[ControlNetEntry],
        own: Sources,
        size_px: tuple[int, int],
    ) -> tuple[Control, ...]:
        controls = []
        for number_, (control, net) in enumerate(zip(request.controls, nets, strict=True)):
            try:
                controls.append(self._control(control, net, own, size_px))
            except FanlightError as error:
                raise error.within(f"controls[{number_}]") from error
        return tuple(controls)

    def _control(
        self, control: diffusion_pb2.Control, net: ControlNetEntry, own: Sources, size_px: tuple[int, int]
    ) -> Control:
        image, hole = self._image(control, net, own)
        return Control(
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
        """The control image, and for the net that fills in what is missing: which of its pixels are transparent."""
        if control.HasField("image") and net.id == INPAINT_CONTROLNET:
            return decoded_with_hole(control.image, "image", self.picture_limits)
        if control.HasField("image"):
            return decoded(control.image, "image", self.picture_limits), None
        if net.id == INPAINT_CONTROLNET and own.image is not None:
            return own.image, None
        raise InvalidField("is missing; a ControlNet conditions on a picture", field="image")


def _parameters(use: diffusion_pb2.AnnotatorUse) -> str:
    parameters = MessageToDict(use.parameters)
    return json.dumps(parameters, sort_keys=True) if parameters else ""


def _hole(image: Image.Image, hole: Image.Image | None, own: Sources) -> Image.Image:
    """What to fill in: by the request's mask, or else what the control image leaves transparent."""
    if own.mask is None:
        if hole is None:
            raise InvalidField(
                "needs a mask, or a control image that is transparent where it is to fill in", field="controlnet"
            )
        return hole
    if image.size != own.mask.size:
        raise InvalidField(f"is {image.width} x {image.height} pixels; must have the mask's size", field="image")
    return own.mask
