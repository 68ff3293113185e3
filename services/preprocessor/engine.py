"""Runs annotations on bounded, named threads, so that the event loop stays free."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from fanlight.errors import Cancelled
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import (
    Annotation,
    AnnotationResult,
    DirectRunner,
    Runner,
    SharedImage,
    annotate,
)
from services.preprocessor.annotator import Annotator, ControlMap, Pixels
from services.preprocessor.cache import AnnotatorCache, AnnotatorCacheLimits, LoadedNetwork
from services.preprocessor.config import CORE_LABEL, CUDA, AnnotatorDevice
from services.preprocessor.faults import blames_annotator, blames_weights
from services.preprocessor.weights import AnnotatorWeights, OnProgress, Weights, ignore_progress
from services.worker.device import DeviceLost, HangWatch

T = TypeVar("T")
# Raises Cancelled if the call was cancelled.
CheckCancelled: TypeAlias = Callable[[], None]

# Weights are read and networks built on a thread of their own, beside the annotations that run.
LOADING_THREADS = 1


class BlamingRunner:
    """A runner whose errors name the part that failed."""

    def __init__(self, runner: Runner, device: AnnotatorDevice) -> None:
        self._runner = runner
        self._device = device
        self.device = runner.device

    def draw(self, annotation: Annotation, image: Pixels) -> ControlMap:
        """The map of an image (H, W, 3) or (H, W, 4) uint8."""
        with blames_annotator(annotation, self._device, self._altered_files):
            return self._runner.draw(annotation, image)

    def _altered_files(self) -> tuple[str, ...]:
        return self._runner.altered_files if isinstance(self._runner, LoadedNetwork) else ()


class AnnotationTimes:
    """The longest time that each annotator took here: its images differ in size and its parameters in work."""

    def __init__(self) -> None:
        # By annotator; there are no more than the registry has.
        self._longest_s: dict[str, float] = {}

    def longest_s(self, annotator_id: str) -> float | None:
        """None where it did not run yet."""
        return self._longest_s.get(annotator_id)

    def note(self, annotator_id: str, took_s: float) -> None:
        self._longest_s[annotator_id] = max(took_s, self._longest_s.get(annotator_id, 0.0))


class AnnotationEngine:
    """Has as many threads as the stage has slots; the caller of `run` holds a slot."""

    def __init__(
        self,
        *,
        threads: int,
        limits: ImageLimits,
        weights: Weights | None = None,
        device: AnnotatorDevice | None = None,
        cache_limits: AnnotatorCacheLimits | None = None,
        watch: HangWatch | None = None,
        on_lost: Callable[[DeviceLost], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_lost`: called when an annotation hangs, and its thread with it."""
        self._limits = limits
        self._watch = watch or HangWatch()
        self._on_lost = on_lost
        self._clock = clock
        self._has_hung = False
        self._times = AnnotationTimes()
        self.device = device or AnnotatorDevice()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="annotate")
        self._loader = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="load")
        self.cache = (
            AnnotatorCache(weights, self.device, self._loader, limits=cache_limits or AnnotatorCacheLimits())
            if weights
            else None
        )

    async def decode(self, annotations: Sequence[Annotation]) -> SharedImage:
        """The one image of several annotations, decoded as each of them needs it."""
        shared_image = SharedImage(annotations[0].image, self._limits)
        variants = {each.annotator.keeps_alpha for each in annotations}

        def decode(check_cancelled: CheckCancelled) -> None:
            for keeps_alpha in variants:
                check_cancelled()
                shared_image.pixels(keeps_alpha=keeps_alpha)

        await self._in_thread(decode, annotations[0].annotator, self._watch.limits.first_s)
        return shared_image

    async def run(
        self,
        annotation: Annotation,
        shared_image: SharedImage | None = None,
        *,
        report: OnProgress = ignore_progress,
    ) -> AnnotationResult:
        """If the call is cancelled, it ends after the current step and returns only then: the slot is still in use.

        DeviceLost if it takes far longer than such annotations do; its thread is lost then, and so is this process.
        `report` receives the progress of weights that must be fetched first.
        """
        model = annotation.annotator.model(annotation.parameters)
        if model is None:
            return await self._annotate(annotation, shared_image)
        async with contextlib.AsyncExitStack() as pinned:
            runner = await self._load(annotation, model, report, pinned)
            return await self._annotate(annotation, shared_image, runner)

    async def _load(
        self, annotation: Annotation, model: AnnotatorWeights, report: OnProgress, pinned: contextlib.AsyncExitStack
    ) -> Runner:
        """The annotator's network, pinned while the stack is open. Errors name the part that failed."""
        assert self.cache is not None, "annotators with models are listed only where they can be loaded"
        try:
            with blames_weights(annotation, self.device):
                return await pinned.enter_async_context(self.cache.use(model, report))
        except DeviceLost as error:
            self._on_lost(error)
            raise

    async def _annotate(
        self, annotation: Annotation, shared_image: SharedImage | None, runner: Runner | None = None
    ) -> AnnotationResult:
        began_s = self._clock()
        blaming = BlamingRunner(runner or DirectRunner(), self.device)
        result = await self._in_thread(
            lambda check_cancelled: annotate(
                annotation,
                limits=self._limits,
                runner=blaming,
                shared_image=shared_image,
                check_cancelled=check_cancelled,
            ),
            annotation.annotator,
            self._limit_s(annotation.annotator),
        )
        self._times.note(annotation.annotator.id, self._clock() - began_s)
        return result

    async def _in_thread(self, work: Callable[[CheckCancelled], T], annotator: Annotator, limit_s: float) -> T:
        cancelled = threading.Event()

        def check_cancelled() -> None:
            if cancelled.is_set():
                raise Cancelled("the call was cancelled")

        try:
            return await self._watch.run(
                self._executor,
                lambda: work(check_cancelled),
                limit_s=limit_s,
                lost=lambda: self._lost(annotator, limit_s),
                on_cancel=cancelled.set,
            )
        except DeviceLost as error:
            self._has_hung = True
            self._on_lost(error)
            raise

    def _limit_s(self, annotator: Annotator) -> float:
        """By its longest time here, and never more than for one that was not measured: no annotator takes minutes."""
        limits = self._watch.limits
        return min(limits.first_s, limits.limit_s(self._times.longest_s(annotator.id)))

    def _lost(self, annotator: Annotator, limit_s: float) -> DeviceLost:
        """A GPU is to blame itself; on a CPU it is the annotator."""
        uses_gpu = bool(annotator.models) and self.device.kind == CUDA
        part = f"device:{self.device.kind}" if uses_gpu else f"annotator:{annotator.id}"
        message = f"{annotator.id} has hung: no result after {limit_s:.0f} s; the worker's process starts again"
        return DeviceLost(message).of_part(part)

    def is_loaded(self, annotator: Annotator) -> bool:
        """Whether it can run without loading weights first."""
        if not annotator.models:
            return True
        return self.cache is not None and annotator.models[0] in self.cache

    def device_label(self, annotator: Annotator) -> str:
        """Kind and precision of the device it runs on here."""
        if not annotator.models or self.cache is None:
            return CORE_LABEL
        return annotator.models[0].device(self.device).label

    def close(self) -> None:
        """Wait for the annotations that still run, unless one has hung."""
        self._executor.shutdown(wait=not self._has_hung, cancel_futures=True)
        self._loader.shutdown(cancel_futures=True)
