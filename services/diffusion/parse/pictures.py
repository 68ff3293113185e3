"""A request's pictures: decoded, checked against each other and brought to the size that is painted."""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Start
from services.diffusion.parse import fields
from services.diffusion.pictures.fit import MASK_THRESHOLD, Resize, fit, fit_mask
from services.kernel.digests import digest_of
from services.kernel.errors import InvalidField
from services.kernel.pictures import PictureLimits, decode_rgb, decode_rgba

IMG2IMG_STRENGTH, INPAINT_STRENGTH = 0.8, 1.0


def decoded(picture: common_pb2.Picture, field: str, limits: PictureLimits) -> Image.Image:
    _refuse_elsewhere(picture, field)
    return decode_rgb(picture.data, field=field, limits=limits)


def decoded_with_hole(
    picture: common_pb2.Picture, field: str, limits: PictureLimits
) -> tuple[Image.Image, Image.Image | None]:
    """RGB, and a mask that is white where the picture is transparent; None where it nowhere is."""
    _refuse_elsewhere(picture, field)
    whole = decode_rgba(picture.data, field=field, limits=limits)
    hole = whole.getchannel("A").point(lambda alpha: 255 if alpha < MASK_THRESHOLD else 0)
    return whole.convert("RGB"), hole if hole.getbbox() else None


def _refuse_elsewhere(picture: common_pb2.Picture, field: str) -> None:
    if picture.WhichOneof("source") in ("blob", "url"):
        raise InvalidField("must be data here; only the gateway takes a blob or a URL", field=field)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """`image` and `mask` of a request as they were sent; None for what it lacks."""

    image: Image.Image | None
    mask: Image.Image | None


def sources(request: diffusion_pb2.GenerateRequest, limits: PictureLimits) -> Sources:
    image = decoded(request.image, "image", limits) if request.HasField("image") else None
    mask = decoded(request.mask, "mask", limits) if request.HasField("mask") else None
    if mask is not None and image is None:
        raise InvalidField("is missing, and there is a mask for it", field="image")
    if mask is not None and image is not None and mask.size != image.size:
        sizes = [f"{side.width} x {side.height}" for side in (mask, image)]
        raise InvalidField(f"is {sizes[0]} pixels, the image {sizes[1]}; they must have one size", field="mask")
    return Sources(image=image, mask=mask)


def start_of(
    request: diffusion_pb2.GenerateRequest, own: Sources, size_px: tuple[int, int], how: Resize, *, is_masked: bool
) -> Start:
    assert own.image is not None
    strength = INPAINT_STRENGTH if is_masked else IMG2IMG_STRENGTH
    if request.HasField("strength"):
        strength = fields.number(request.strength, "strength", 1.0)
    if int(fields.steps(request) * strength) < 1:
        raise InvalidField(f"is {strength:g}; of {fields.steps(request)} steps that leaves none", field="strength")
    return Start(
        image=fit(own.image, size_px, how),
        strength=strength,
        mask=fit_mask(own.mask, size_px, how) if is_masked and own.mask is not None else None,
    )


def digests_of_pictures(request: diffusion_pb2.GenerateRequest) -> Iterator[tuple[str, str]]:
    """By field, of the bytes that were sent."""
    if request.HasField("image"):
        yield "image", digest_of(request.image.data)
    if request.HasField("mask"):
        yield "mask", digest_of(request.mask.data)
    for number, control in enumerate(request.controls):
        if control.HasField("image"):
            yield f"controls[{number}].image", digest_of(control.image.data)
