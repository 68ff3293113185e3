"""One annotation from encoded picture to encoded control image. Blocking; knows no thread, no slot and no wire."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import cv2
import numpy as np

from services.kernel.errors import InvalidField, TooLarge
from services.kernel.parameters import Value
from services.kernel.pictures import PictureLimits, decode_rgb
from services.preprocessor.annotator import Annotator, Pixels

MEDIA_TYPE = "image/png"

# Quick first, small second. A grey map is mostly flat, so filters only cost; a picture needs one.
PNG_QUICK = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE)
PNG_MAP = (*PNG_QUICK, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE)
PNG_COLOUR = (*PNG_QUICK, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG)

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """What is asked for. Every parameter has its value."""

    annotator: Annotator
    parameters: Mapping[str, Value]
    picture: bytes = field(repr=False)
    # Width and height in pixels; None for the picture's own.
    size: Size | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImage:
    """A PNG: RGB, or one grey channel where the map has one. Whoever feeds a ControlNet reads it as RGB."""

    data: bytes = field(repr=False)
    width_px: int
    height_px: int
    spans: tuple[tuple[str, float], ...] = ()


class Spans:
    """How long each stretch of the work took, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.taken: list[tuple[str, float]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start_s = self._clock()
        yield
        self.taken.append((name, self._clock() - start_s))


def parse_size(width_px: int, height_px: int, limits: PictureLimits) -> Size | None:
    """None where neither is given. InvalidField for one alone, TooLarge above the limits."""
    if not width_px and not height_px:
        return None
    if not width_px or not height_px:
        missing = "height_px" if width_px else "width_px"
        raise InvalidField("is missing; give both width_px and height_px, or none of them", field=missing)
    for name, side_px in (("width_px", width_px), ("height_px", height_px)):
        if side_px > limits.side_px:
            raise TooLarge(f"is {side_px}; at most {limits.side_px} pixels a side are made", field=name)
    if width_px * height_px > limits.pixels:
        raise TooLarge(
            f"{width_px} x {height_px} is more than the {limits.pixels} pixels that are made", field="width_px"
        )
    return width_px, height_px


def annotate(
    asked: Annotation,
    *,
    limits: PictureLimits,
    go_on: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> ControlImage:
    """InvalidField and TooLarge about `picture`. `go_on` is called before each step and may raise."""
    spans = Spans(clock)
    go_on()
    with spans.measure("decode"):
        picture = _resized(np.asarray(decode_rgb(asked.picture, field="picture", limits=limits)), asked.size)
    go_on()
    with spans.measure("annotate"):
        control = asked.annotator(picture, **asked.parameters)
    go_on()
    with spans.measure("encode"):
        data = _png(control)
    height_px, width_px = control.shape[:2]
    return ControlImage(data=data, width_px=width_px, height_px=height_px, spans=tuple(spans.taken))


def _resized(picture: Pixels, size: Size | None) -> Pixels:
    """The picture stretched to the size, so that lines are drawn at it; filters as in controlnet_aux's resize_image."""
    height_px, width_px = picture.shape[:2]
    if size is None or size == (width_px, height_px):
        return picture
    grows = size[0] * size[1] > width_px * height_px
    return cv2.resize(picture, size, interpolation=cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA)


def _png(control: Pixels) -> bytes:
    if control.ndim == 2:
        written, data = cv2.imencode(".png", control, PNG_MAP)
    else:
        written, data = cv2.imencode(".png", cv2.cvtColor(control, cv2.COLOR_RGB2BGR), PNG_COLOUR)
    assert written
    return data.tobytes()
