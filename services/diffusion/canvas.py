"""The canvas of a generation: an image with the sides that outpainting adds, and the part of it that is generated.

All that belongs to the image, its mask and its control images, is laid on the canvas and cut the same way. Loads no
torch.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from fanlight.contract.masks import Sides, is_alike
from services.diffusion.images import Pixels, Resize, fit, inner_box, inner_size
from services.diffusion.masks import WHITE, Box, Size, crop_region, expanded, shown

FloatBox = tuple[float, float, float, float]
_LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True, slots=True, kw_only=True)
class Paste:
    """Puts what was generated into the image that it is a part of."""

    # RGB and grayscale, of the result's size: the image as it was, and how much of the generated one shows.
    original: Image.Image = field(repr=False)
    shown: Image.Image = field(repr=False)
    # Which part of the original was generated, and where that part lies in the generated image.
    part: Box
    inner: Box

    @property
    def size_px(self) -> Size:
        return self.original.size

    def onto(self, pixels: Pixels) -> Pixels:
        """Generated pixels (H, W, 3) to the result's; where nothing is to show, they are the original's bit by bit."""
        generated = Image.fromarray(pixels).crop(self.inner)
        size_px = self.part[2] - self.part[0], self.part[3] - self.part[1]
        if generated.size != size_px:
            generated = generated.resize(size_px, _LANCZOS)
        mixed = Image.composite(generated, self.original.crop(self.part), self.shown.crop(self.part))
        result = self.original.copy()
        result.paste(mixed, self.part[:2])
        return np.asarray(result)

    def hidden(self, pixels: Pixels) -> Pixels:
        """Pixels (H, W, 3) that stand for the whole result, such as a black image, at the result's size."""
        return np.asarray(Image.fromarray(pixels).resize(self.size_px))


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """An image to start from, for one size; what lies on it is generated where `only_masked` and the mask say."""

    image: Image.Image = field(repr=False)
    # Grayscale, of the image's size; None: nothing of it is masked.
    mask: Image.Image | None = field(repr=False)
    sides: Sides
    # Of what is generated.
    size_px: Size
    how: Resize
    only_masked: bool = False
    # For `only_masked`.
    padding_px: int = 0
    blur_px: float = 0.0

    @property
    def whole_size(self) -> Size:
        return self.sides.around(self.image.size)

    @cached_property
    def whole(self) -> Image.Image:
        """The image and its new sides, which begin as its edge goes on."""
        return _with_sides(self.image, self.sides)

    @cached_property
    def whole_mask(self) -> Image.Image:
        """New sides are white."""
        mask = Image.new("L", self.whole_size, WHITE if self.sides else 0)
        mask.paste(self.mask or Image.new("L", self.image.size), (self.sides.left, self.sides.top))
        return mask

    @cached_property
    def _shown(self) -> Image.Image:
        return shown(self.whole_mask, self.blur_px)

    @cached_property
    def _region(self) -> Box | None:
        """The part of the canvas that is generated; None: what `how` makes of the whole."""
        region = crop_region(self._shown, self.padding_px) if self.only_masked else None
        if region is None:
            return (0, 0, *self.whole_size) if self.only_masked else None
        return expanded(region, self.size_px, self.whole_size)

    @cached_property
    def start(self) -> Image.Image:
        """What is generated from, RGB, of the generated size."""
        return self._cut(self.whole)

    @cached_property
    def start_mask(self) -> Image.Image:
        """Of the generated size. What padding adds to the whole is white: there is nothing to keep there."""
        return self._cut(self.whole_mask)

    def _cut(self, layer: Image.Image) -> Image.Image:
        if self._region is not None:
            return _with_edges(layer.crop(self._region), self.size_px)
        if layer.mode != "L":
            return fit(layer, self.size_px, self.how)
        # Lanczos would lay faint rings around the mask.
        return fit(layer, self.size_px, self.how, padding=WHITE, resampling=Image.Resampling.BILINEAR)

    def paste(self) -> Paste:
        if self._region is not None:
            inner = _centered(inner_size(_size(self._region), self.size_px), self.size_px)
            return Paste(original=self.whole, shown=self._shown, part=self._region, inner=inner)
        box = (0, 0, *self.size_px)
        return Paste(original=self.start, shown=shown(self.start_mask, self.blur_px), part=box, inner=box)

    @property
    def is_cut(self) -> bool:
        """Whether something else than the image itself is generated: a part of it, or more than it."""
        return self._region is not None or bool(self.sides)

    def place(self, layer: Image.Image, how: Resize) -> Image.Image:
        """A control image as it lies on the image, cut as the image is; black where it does not reach.

        One that has the whole canvas's aspect ratio and not the image's lies on the new sides too. `how`: what is done
        where it has neither.
        """
        if not self.is_cut:
            return fit(layer, self.size_px, how)
        source, at = _laid(layer.size, self._place_of(layer.size), how)
        part, inner = self._view()
        scale = (inner[2] - inner[0]) / (part[2] - part[0]), (inner[3] - inner[1]) / (part[3] - part[1])
        result = Image.new(layer.mode, self.size_px)
        spans = [
            _span(source[i : i + 3 : 2], at[i : i + 3 : 2], part[i : i + 3 : 2], inner[i : i + 3 : 2], scale[i])
            for i in (0, 1)
        ]
        if any(high <= low for low, high, _, _ in spans):
            return result
        (left, right, from_left, from_right), (top, bottom, from_top, from_bottom) = spans
        box = (from_left, from_top, from_right, from_bottom)
        result.paste(layer.resize((right - left, bottom - top), _LANCZOS, box=box), (left, top))
        return result

    def _place_of(self, size: Size) -> FloatBox:
        """The part of the canvas that a control image of that size is about."""
        if is_alike(size, self.whole_size) and not is_alike(size, self.image.size):
            return (0.0, 0.0, *self.whole_size)
        left, top = self.sides.left, self.sides.top
        return left, top, left + self.image.width, top + self.image.height

    def _view(self) -> tuple[FloatBox, Box]:
        """The part of the canvas that is generated, and where it lies in the generated image."""
        whole: Box = (0, 0, *self.size_px)
        if self._region is not None:
            return self._region, _centered(inner_size(_size(self._region), self.size_px), self.size_px)
        if self.how is Resize.CROP:
            return inner_box(self.whole_size, self.size_px), whole
        if self.how is Resize.STRETCH:
            return (0.0, 0.0, *self.whole_size), whole
        return (0.0, 0.0, *self.whole_size), _centered(inner_size(self.whole_size, self.size_px), self.size_px)


def _size(box: Box) -> Size:
    return box[2] - box[0], box[3] - box[1]


def _centered(inner: Size, outer: Size) -> Box:
    left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def _with_sides(image: Image.Image, sides: Sides) -> Image.Image:
    if not sides:
        return image
    around = ((sides.top, sides.bottom), (sides.left, sides.right), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), around, mode="edge"))


def _with_edges(part: Image.Image, size_px: Size) -> Image.Image:
    """Scaled to fit inside the size, its edges going on as far as the size goes."""
    inner = inner_size(part.size, size_px)
    resampling = Image.Resampling.BILINEAR if part.mode == "L" else _LANCZOS
    scaled = part if part.size == inner else part.resize(inner, resampling)
    if inner == size_px:
        return scaled
    left, top, right, bottom = _centered(inner, size_px)
    around = [(top, size_px[1] - bottom), (left, size_px[0] - right)] + [(0, 0)] * (part.mode != "L")
    return Image.fromarray(np.pad(np.asarray(scaled), around, mode="edge"))


def _laid(size: Size, place: FloatBox, how: Resize) -> tuple[FloatBox, FloatBox]:
    """For a place on the canvas: which part of a layer of that size is used, and which part of the canvas it covers."""
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    width, height = place[2] - place[0], place[3] - place[1]
    if how is Resize.STRETCH:
        return whole, place
    if how is Resize.CROP:
        scale = min(size[0] / width, size[1] / height)
        left, top = (size[0] - width * scale) / 2, (size[1] - height * scale) / 2
        return (left, top, size[0] - left, size[1] - top), place
    scale = min(width / size[0], height / size[1])
    left, top = place[0] + (width - size[0] * scale) / 2, place[1] + (height - size[1] * scale) / 2
    return whole, (left, top, left + size[0] * scale, top + size[1] * scale)


def _span(
    source: tuple[float, ...], at: tuple[float, ...], part: tuple[float, ...], inner: tuple[int, ...], scale: float
) -> tuple[int, int, float, float]:
    """In one direction: which pixels of the generated image a layer covers, and with which part of it."""
    low = max(inner[0], round(inner[0] + (max(at[0], part[0]) - part[0]) * scale))
    high = min(inner[1], round(inner[0] + (min(at[1], part[1]) - part[0]) * scale))
    per_px = (source[1] - source[0]) / (at[1] - at[0])

    def back(pixel: int) -> float:
        return min(max(source[0] + (part[0] + (pixel - inner[0]) / scale - at[0]) * per_px, source[0]), source[1])

    return low, high, back(low), back(high)
