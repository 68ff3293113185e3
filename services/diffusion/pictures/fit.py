"""Brings a picture to the size that is painted. Needs no torch."""

from enum import StrEnum

from PIL import Image

# From here on a mask's pixel counts as white, as in diffusers' mask processor.
MASK_THRESHOLD = 128


class Resize(StrEnum):
    """What becomes of a picture whose aspect is not the wanted size's."""

    CROP = "crop"
    STRETCH = "stretch"
    PAD = "pad"


def fit(image: Image.Image, size_px: tuple[int, int], how: Resize, *, padding: int = 0) -> Image.Image:
    """The image at that size, scaled as diffusers' pipelines do. `padding`: the grey that PAD adds."""
    if image.size == size_px:
        return image
    if how is Resize.STRETCH:
        return image.resize(size_px, Image.Resampling.LANCZOS)
    if how is Resize.CROP:
        return image.resize(size_px, Image.Resampling.LANCZOS, box=_inner_box(image.size, size_px))
    return _padded(image, size_px, padding)


def fit_mask(mask: Image.Image, size_px: tuple[int, int], how: Resize) -> Image.Image:
    """Greyscale, black or white alone. What PAD adds is white: there is nothing there to keep."""
    grey = fit(mask.convert("L"), size_px, how, padding=255)
    return grey.point(lambda value: 255 if value >= MASK_THRESHOLD else 0)


def _inner_box(size_px: tuple[int, int], wanted_px: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box of the wanted aspect in the middle."""
    (width, height), (wanted_width, wanted_height) = size_px, wanted_px
    scale = min(width / wanted_width, height / wanted_height)
    left, top = (width - wanted_width * scale) / 2, (height - wanted_height * scale) / 2
    return max(left, 0.0), max(top, 0.0), min(width - left, width), min(height - top, height)


def _padded(image: Image.Image, size_px: tuple[int, int], padding: int) -> Image.Image:
    scale = min(size_px[0] / image.width, size_px[1] / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    color = padding if image.mode == "L" else (padding,) * 3
    canvas = Image.new(image.mode, size_px, color)
    scaled = image if image.size == inner else image.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(scaled, ((size_px[0] - inner[0]) // 2, (size_px[1] - inner[1]) // 2))
    return canvas
