"""One annotation from encoded picture to encoded control image. Blocking; knows no thread, no slot and no wire."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fanlight.contract.parameters import Value
from services.kernel.pictures import PictureLimits
from services.preprocessor import poses
from services.preprocessor.annotator import Annotator, Drawn, Pixels
from services.preprocessor.decoding import decode
from services.preprocessor.device import PLAIN_LABEL
from services.preprocessor.encoding import png
from services.preprocessor.sizing import Frame, Size, cut, fitted, frame_of, resized, working_size

# What is about sizes, and no affair of an annotator.
_SIZES = ("detect_resolution", "resize_mode", "short_side_px", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """What is asked for. Every parameter has its value."""

    annotator: Annotator
    parameters: Mapping[str, Value]
    image: bytes = field(repr=False)
    # Width and height in pixels; None for the picture's own.
    size: Size | None = None

    @property
    def own_parameters(self) -> dict[str, Value]:
        return {name: value for name, value in self.parameters.items() if name not in _SIZES}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImage:
    """A PNG: RGB, RGBA, or one grey channel where the map has one. Whoever feeds a ControlNet reads it as RGB."""

    data: bytes = field(repr=False)
    width_px: int
    height_px: int
    spans: tuple[tuple[str, float], ...] = ()
    # OpenPose's JSON; empty where no pose was looked for.
    pose_json: str = field(default="", repr=False)
    device: str = PLAIN_LABEL


class Hand(Protocol):
    """What draws the map: the annotator itself, or the lane of its loaded model."""

    device: str

    def draw(self, asked: Annotation, picture: Pixels) -> Drawn: ...


class BareHand:
    """For annotators without a model."""

    device = PLAIN_LABEL

    def draw(self, asked: Annotation, picture: Pixels) -> Drawn:
        return asked.annotator.draw([picture], None, **asked.own_parameters)[0]


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


class Source:
    """A picture that several annotators may look at; decoded once for each way of looking at it."""

    def __init__(self, data: bytes, limits: PictureLimits) -> None:
        self._data = data
        self._limits = limits
        self._decoded: dict[bool, Pixels] = {}

    def pixels(self, *, keeps_alpha: bool = False) -> Pixels:
        """(H, W, 3), or (H, W, 4) with its transparency. InvalidField and TooLarge about `picture`."""
        if keeps_alpha not in self._decoded:
            self._decoded[keeps_alpha] = decode(self._data, keeps_alpha=keeps_alpha, limits=self._limits)
        return self._decoded[keeps_alpha]


def annotate(
    asked: Annotation,
    *,
    limits: PictureLimits,
    hand: Hand | None = None,
    source: Source | None = None,
    go_on: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> ControlImage:
    """InvalidField and TooLarge about `picture`. `go_on` is called before each step and may raise."""
    spans, hand = Spans(clock), hand or BareHand()
    go_on()
    with spans.measure("decode"):
        pixels = (source or Source(asked.image, limits)).pixels(keeps_alpha=asked.annotator.keeps_alpha)
        frame = frame_of((pixels.shape[1], pixels.shape[0]), asked.size, asked.parameters, limits)
        short_px = int(asked.parameters.get("detect_resolution", 0))
        size = working_size(frame.inner, short_px, in_steps=asked.annotator.works_in_steps)
        picture = resized(cut(pixels, frame.crop), size)
    go_on()
    with spans.measure("annotate"):
        drawn = hand.draw(asked, picture)
    go_on()
    with spans.measure("encode"):
        data, pose_json = _encoded(asked.annotator, drawn, frame)
    width_px, height_px = frame.outer
    return ControlImage(
        data=data,
        width_px=width_px,
        height_px=height_px,
        spans=tuple(spans.taken),
        pose_json=pose_json,
        device=hand.device,
    )


def _encoded(annotator: Annotator, drawn: Drawn, frame: Frame) -> tuple[bytes, str]:
    """The PNG, and OpenPose's JSON, which it also carries inside."""
    control = fitted(drawn.pixels, frame, has_labels=annotator.has_labels)
    pose_json = ""
    if drawn.people is not None:
        pose_json = poses.to_json(drawn.people, canvas=frame.outer, inner=frame.inner, offset=frame.offset)
    # A map whose size was changed has greys.
    is_bilevel = annotator.is_bilevel and drawn.pixels.shape[1::-1] == frame.inner
    return png(control, is_bilevel=is_bilevel, texts={"openpose": pose_json} if pose_json else {}), pose_json
