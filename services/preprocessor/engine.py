"""Runs annotations on bounded, named threads, so that the event loop stays free."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from fanlight.errors import Cancelled
from services.kernel.images import ImageLimits
from services.kernel.process import run_blocking
from services.preprocessor.annotation import Annotation, AnnotationResult, Runner, SharedImage, annotate
from services.preprocessor.annotator import Annotator
from services.preprocessor.cache import AnnotatorCache, AnnotatorCacheLimits
from services.preprocessor.config import CORE_LABEL, AnnotatorDevice
from services.preprocessor.weights import OnProgress, Weights, ignore_progress

T = TypeVar("T")
# Raises Cancelled if the call was cancelled.
CheckCancelled: TypeAlias = Callable[[], None]

# Weights are read and networks built on a thread of their own, beside the annotations that run.
LOADING_THREADS = 1


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
    ) -> None:
        self._limits = limits
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

        await self._in_thread(decode)
        return shared_image

    async def run(
        self,
        annotation: Annotation,
        shared_image: SharedImage | None = None,
        *,
        report: OnProgress = ignore_progress,
    ) -> AnnotationResult:
        """If the call is cancelled, it ends after the current step and returns only then: the slot is still in use.

        `report` receives the progress of weights that must be fetched first.
        """
        model = annotation.annotator.model(annotation.parameters)
        if model is None:
            return await self._annotate(annotation, shared_image)
        assert self.cache is not None, "annotators with models are listed only where they can be loaded"
        async with self.cache.use(model, report) as runner:
            return await self._annotate(annotation, shared_image, runner)

    async def _annotate(
        self, annotation: Annotation, shared_image: SharedImage | None, runner: Runner | None = None
    ) -> AnnotationResult:
        return await self._in_thread(
            lambda check_cancelled: annotate(
                annotation,
                limits=self._limits,
                runner=runner,
                shared_image=shared_image,
                check_cancelled=check_cancelled,
            )
        )

    async def _in_thread(self, work: Callable[[CheckCancelled], T]) -> T:
        cancelled = threading.Event()

        def check_cancelled() -> None:
            if cancelled.is_set():
                raise Cancelled("the call was cancelled")

        return await run_blocking(self._executor, lambda: work(check_cancelled), on_cancel=cancelled.set)

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
        """Wait for the annotations that still run."""
        self._executor.shutdown(cancel_futures=True)
        self._loader.shutdown(cancel_futures=True)
