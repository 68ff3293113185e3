"""A request's pictures: decoded, checked against each other and brought to the size that is painted."""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from fanlight.common.v1 import common_pb2
from fanlight.contract.digests import digest_of
from fanlight.contract.generation import strength_of
from fanlight.contract.images import images_of
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField
from services.diffusion.generation import Start
from services.diffusion.pictures.fit import MASK_THRESHOLD, Resize, fit, fit_mask
from services.kernel.pictures import PictureLimits, decode_rgb, decode_rgba


def decoded(picture: common_pb2.ImageSource, field: str, limits: PictureLimits) -> Image.Image:
    return decode_rgb(picture.data, field=field, limits=limits)


def decoded_with_hole(
    picture: common_pb2.ImageSource, field: str, limits: PictureLimits
) -> tuple[Image.Image, Image.Image | None]:
    """RGB, and a mask that is white where the picture is transparent; None where it nowhere is."""
    whole = decode_rgba(picture.data, field=field, limits=limits)
    hole = whole.getchannel("A").point(lambda alpha: 255 if alpha < MASK_THRESHOLD else 0)
    return whole.convert("RGB"), hole if hole.getbbox() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """`image` and `mask` of a request as they were sent; None for what it lacks."""

    image: Image.Image | None
    mask: Image.Image | None


def sources(request: diffusion_pb2.GenerateRequest, limits: PictureLimits) -> Sources:
    image = decoded(request.image, "image", limits) if request.HasField("image") else None
    mask = decoded(request.mask, "mask", limits) if request.HasField("mask") else None
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


def digests_of_pictures(request: diffusion_pb2.GenerateRequest) -> Iterator[tuple[str, str]]:
    """By field, of the bytes that were sent."""
    for field, picture in images_of(request):
        yield field, digest_of(picture.data)
