"""Runs annotations on bounded, named threads, so that the event loop stays free."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from fanlight.errors import Cancelled
from services.kernel.pictures import PictureLimits
from services.kernel.threads import to_its_end
from services.preprocessor.annotation import Annotation, ControlImage, Hand, Source, annotate
from services.preprocessor.annotator import Annotator
from services.preprocessor.device import PLAIN_LABEL, Device
from services.preprocessor.residency import Residency, ResidencyLimits
from services.preprocessor.weights import Tell, Weights, tell_nobody

T = TypeVar("T")
# Raises once the work is to end.
GoOn: TypeAlias = Callable[[], None]

# A model is built and weights are read beside the annotations that run.
LOADING_THREADS = 1


class Engine:
    """As many threads as the stage has slots; whoever calls `run` holds a slot."""

    def __init__(
        self,
        *,
        threads: int,
        limits: PictureLimits,
        weights: Weights | None = None,
        device: Device | None = None,
        residency_limits: ResidencyLimits | None = None,
    ) -> None:
        self._limits = limits
        self.device = device or Device()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="annotate")
        self._loader = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="load")
        self.residency = (
            Residency(weights, self.device, self._loader, limits=residency_limits or ResidencyLimits())
            if weights
            else None
        )

    async def decode(self, asked: Sequence[Annotation]) -> Source:
        """The one picture of several annotations, decoded for each way in which they look at it."""
        source = Source(asked[0].image, self._limits)
        ways = {each.annotator.keeps_alpha for each in asked}

        def decode(go_on: GoOn) -> None:
            for keeps_alpha in ways:
                go_on()
                source.pixels(keeps_alpha=keeps_alpha)

        await self._in_thread(decode)
        return source

    async def run(self, asked: Annotation, source: Source | None = None, *, tell: Tell = tell_nobody) -> ControlImage:
        """Cancelling the call ends the work after its present step, and returns only then: the slot is still in use.

        `tell` hears how weights come that are not held yet.
        """
        model = asked.annotator.model(asked.parameters)
        if model is None:
            return await self._annotate(asked, source)
        assert self.residency is not None, "annotators with models are listed only where they can be loaded"
        async with self.residency.use(model, tell) as hand:
            return await self._annotate(asked, source, hand)

    async def _annotate(self, asked: Annotation, source: Source | None, hand: Hand | None = None) -> ControlImage:
        return await self._in_thread(
            lambda go_on: annotate(asked, limits=self._limits, hand=hand, source=source, go_on=go_on)
        )

    async def _in_thread(self, work: Callable[[GoOn], T]) -> T:
        cancelled = threading.Event()

        def go_on() -> None:
            if cancelled.is_set():
                raise Cancelled("the call was cancelled")

        return await to_its_end(self._executor, lambda: work(go_on), on_cancel=cancelled.set)

    def holds(self, annotator: Annotator) -> bool:
        """Ready to run without loading weights first."""
        if not annotator.models:
            return True
        return self.residency is not None and self.residency.holds(annotator.models[0])

    def device_label(self, annotator: Annotator) -> str:
        """On what it runs here."""
        if not annotator.models or self.residency is None:
            return PLAIN_LABEL
        return annotator.models[0].device(self.residency.device).label

    def close(self) -> None:
        """Wait for what still runs."""
        self._executor.shutdown(cancel_futures=True)
        self._loader.shutdown(cancel_futures=True)
