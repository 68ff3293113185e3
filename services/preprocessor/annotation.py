"""One annotation, from the encoded image to the encoded control image. Blocking; knows no thread, slot or wire."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fanlight.contract.parameters import Value
from services.kernel.images import ImageLimits
from services.preprocessor import poses
from services.preprocessor.annotator import Annotator, ControlMap, Pixels
from services.preprocessor.codec import decode, encode_png
from services.preprocessor.config import CORE_LABEL
from services.preprocessor.sizing import CropFrame, Size, crop, crop_frame, fit_to_frame, resize, working_size

# Parameters that are used here, or choose the model; `Annotator.apply` does not receive them.
_NOT_OF_APPLY = ("detect_resolution", "resize_mode", "short_side_px", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One request. Every parameter has a value."""

    annotator: Annotator
    parameters: Mapping[str, Value]
    image: bytes = field(repr=False)
    # Width and height of the control image in pixels; None for the image's own.
    size: Size | None = None

    @property
    def own_parameters(self) -> dict[str, Value]:
        """Those that the annotator's `apply` takes."""
        return {name: value for name, value in self.parameters.items() if name not in _NOT_OF_APPLY}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationResult:
    """A control image: a PNG in RGB, RGBA or one gray channel, as the map has it. ControlNets read it as RGB."""

    data: bytes = field(repr=False)
    width_px: int
    height_px: int
    # Name and seconds of each step.
    spans: tuple[tuple[str, float], ...] = ()
    # OpenPose's JSON; empty if the annotator detects no people.
    pose_json: str = field(default="", repr=False)
    device: str = CORE_LABEL


class Runner(Protocol):
    """What draws the map: the annotator directly, or its loaded network, which may batch several images."""

    device: str

    def draw(self, annotation: Annotation, image: Pixels) -> ControlMap:
        """The map of an image (H, W, 3) uint8, or (H, W, 4) if the annotator keeps transparency."""
        ...


class DirectRunner:
    """For annotators without a model."""

    device = CORE_LABEL

    def draw(self, annotation: Annotation, image: Pixels) -> ControlMap:
        """The map of an image (H, W, 3) or (H, W, 4) uint8."""
        return annotation.annotator.draw([image], None, **annotation.own_parameters)[0]


class SpanTimer:
    """Measures how long each step takes, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.spans: list[tuple[str, float]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start_s = self._clock()
        yield
        self.spans.append((name, self._clock() - start_s))


class SharedImage:
    """One encoded image for several annotators; decoded once with and once without transparency, when first needed."""

    def __init__(self, data: bytes, limits: ImageLimits) -> None:
        self._data = data
        self._limits = limits
        self._decoded: dict[bool, Pixels] = {}

    def pixels(self, *, keeps_alpha: bool = False) -> Pixels:
        """(H, W, 3), or (H, W, 4) with its transparency; uint8. InvalidField and TooLarge about `image`."""
        if keeps_alpha not in self._decoded:
            self._decoded[keeps_alpha] = decode(self._data, keeps_alpha=keeps_alpha, limits=self._limits)
        return self._decoded[keeps_alpha]


def annotate(
    annotation: Annotation,
    *,
    limits: ImageLimits,
    runner: Runner | None = None,
    shared_image: SharedImage | None = None,
    check_cancelled: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> AnnotationResult:
    """InvalidField and TooLarge about `image`. `check_cancelled` is called before each step and may raise."""
    annotator, parameters = annotation.annotator, annotation.parameters
    timer, runner = SpanTimer(clock), runner or DirectRunner()
    check_cancelled()
    with timer.measure("decode"):
        pixels = (shared_image or SharedImage(annotation.image, limits)).pixels(keeps_alpha=annotator.keeps_alpha)
        frame = crop_frame((pixels.shape[1], pixels.shape[0]), annotation.size, parameters, limits)
        short_px = int(parameters.get("detect_resolution", 0))
        size = working_size(frame.inner, short_px, aligned=annotator.needs_aligned_size)
        image = resize(crop(pixels, frame.crop), size)
    check_cancelled()
    with timer.measure("annotate"):
        control = runner.draw(annotation, image)
    check_cancelled()
    with timer.measure("encode"):
        data, pose_json = _encode(annotator, control, frame)
    width_px, height_px = frame.outer
    return AnnotationResult(
        data=data,
        width_px=width_px,
        height_px=height_px,
        spans=tuple(timer.spans),
        pose_json=pose_json,
        device=runner.device,
    )


def _encode(annotator: Annotator, control: ControlMap, frame: CropFrame) -> tuple[bytes, str]:
    """The PNG, and OpenPose's JSON, which the PNG contains too."""
    pixels = fit_to_frame(control.pixels, frame, has_labels=annotator.has_labels)
    pose_json = ""
    if control.people is not None:
        pose_json = poses.to_json(control.people, canvas=frame.outer, inner=frame.inner, offset=frame.offset)
    # A bilevel map that was resized has grays.
    is_bilevel = annotator.is_bilevel and control.pixels.shape[1::-1] == frame.inner
    return encode_png(pixels, is_bilevel=is_bilevel, texts={"openpose": pose_json} if pose_json else {}), pose_json
