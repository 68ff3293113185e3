"""A request's controls: which ControlNets, on what, how strongly, and what each net wants for itself."""

import json
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict
from PIL import Image

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Control
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.parse.fields import number
from services.diffusion.parse.pictures import Sources, decoded, decoded_with_hole
from services.diffusion.pictures.fit import Resize, fit, fit_mask
from services.kernel.errors import FanlightError, InvalidField, TooLarge
from services.kernel.pictures import PictureLimits

CONTROLS_LIMIT = 8
CONTROL_SCALE_LIMIT = 2.0
# Of what is only told on.
ANNOTATOR_CHARACTERS_LIMIT, PARAMETERS_LIMIT_BYTES = 100, 4096

# Its control image is the picture with the masked pixels missing.
INPAINT = "inpaint"
# By ControlNet: how its text encoder was used in training.
CLIP_SKIPS = {"lineart_anime": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReader:
    catalogue: Catalogue
    checkpoint: CheckpointEntry
    limits: PictureLimits
    how: Resize

    def nets(self, request: diffusion_pb2.GenerateRequest) -> list[ControlNetEntry]:
        if len(request.controls) > CONTROLS_LIMIT:
            raise InvalidField(f"has {len(request.controls)} controls; at most {CONTROLS_LIMIT}", field="controls")
        nets = []
        for number_, control in enumerate(request.controls):
            try:
                nets.append(self._net(control))
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

    def _net(self, control: diffusion_pb2.Control) -> ControlNetEntry:
        if not control.controlnet:
            raise InvalidField("is empty; name a ControlNet", field="controlnet")
        return self.catalogue.controlnet(control.controlnet, self.checkpoint)

    def _control(
        self, control: diffusion_pb2.Control, net: ControlNetEntry, own: Sources, size_px: tuple[int, int]
    ) -> Control:
        start = number(control.start if control.HasField("start") else 0.0, "start", 1.0)
        end = number(control.end if control.HasField("end") else 1.0, "end", 1.0)
        if start >= end:
            raise InvalidField(f"is {start:g}; must be below the end, {end:g}", field="start")
        scale = number(control.scale if control.HasField("scale") else 1.0, "scale", CONTROL_SCALE_LIMIT)
        image, hole = self._image(control, net, own)
        return Control(
            controlnet=net,
            scale=scale,
            start=start,
            end=end,
            image=fit(image, size_px, self.how),
            mask=fit_mask(_hole(image, hole, own), size_px, self.how) if net.id == INPAINT else None,
            annotator=_short(control.annotator),
            annotator_parameters=_parameters(control),
        )

    def _image(
        self, control: diffusion_pb2.Control, net: ControlNetEntry, own: Sources
    ) -> tuple[Image.Image, Image.Image | None]:
        """The control image, and for the net that fills in what is missing: which of its pixels are transparent."""
        if control.HasField("image") and net.id == INPAINT:
            return decoded_with_hole(control.image, "image", self.limits)
        if control.HasField("image"):
            return decoded(control.image, "image", self.limits), None
        if net.id == INPAINT and own.image is not None:
            return own.image, None
        raise InvalidField("is missing; a ControlNet conditions on a picture", field="image")


def _short(annotator: str) -> str:
    if len(annotator) > ANNOTATOR_CHARACTERS_LIMIT:
        raise TooLarge(f"has more than {ANNOTATOR_CHARACTERS_LIMIT} characters", field="annotator")
    return annotator


def _parameters(control: diffusion_pb2.Control) -> str:
    if control.annotator_parameters.ByteSize() > PARAMETERS_LIMIT_BYTES:
        raise TooLarge(f"is larger than {PARAMETERS_LIMIT_BYTES} bytes", field="annotator_parameters")
    given = MessageToDict(control.annotator_parameters)
    return json.dumps(given, sort_keys=True) if given else ""


def wants_hole(nets: list[ControlNetEntry]) -> bool:
    return any(net.id == INPAINT for net in nets)


def clip_skip_of(nets: list[ControlNetEntry]) -> int:
    """What a request that does not say gets."""
    return max((CLIP_SKIPS.get(net.id, 1) for net in nets), default=1)


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
