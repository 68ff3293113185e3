"""The engine: images in batches on one device thread, which they join and leave between evaluations of the model.

Knows no torch and no protobuf: a Backend does the work.
"""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fanlight.contract.limits import size_class
from fanlight.errors import ResourceExhausted
from services.diffusion.engine.batching import BatchQueue, batch_key
from services.diffusion.engine.generation import Generation
from services.diffusion.engine.ports import (
    Backend,
    DeviceLost,
    DeviceResult,
    Report,
    RequestState,
    StepProgress,
    TimedResult,
)
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.kernel.averages import MovingAverage

# How much the latest evaluation's time counts against those before.
LATEST_WEIGHT = 0.2
# For how many families and sizes step times are kept: those measured last.
CLASSES_LIMIT = 32
Result = TypeVar("Result")


class DeviceThread:
    """The one thread that owns the device."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def attempt(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """Run `work` on the thread and return its finished future: an error is stored in it, not raised."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        await asyncio.wait([future])
        return future

    def close(self) -> None:
        """Take no more work, and do not wait for running work: an import of torch may take a minute."""
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStepTime:
    """Seconds of one evaluation, whatever the batch. `size_class`: round(log2(width x height))."""

    family: str
    size_class: int
    mean_s: float
    deviation_s: float = 0.0


class StepTimes:
    """How long one evaluation of the model takes, by family and size: exponentially weighted. For one thread."""

    def __init__(self) -> None:
        # The one that was measured longest ago first.
        self._times: OrderedDict[tuple[str, int], MovingAverage] = OrderedDict()

    def __iter__(self) -> Iterator[MeasuredStepTime]:
        for (family, size), average in sorted(self._times.items(), key=lambda item: item[0]):
            yield MeasuredStepTime(family=family, size_class=size, mean_s=average.mean, deviation_s=average.deviation)

    def note(self, family: str, size_class: int, took_s: float) -> None:
        key = (family, size_class)
        average = self._times.pop(key, None) or MovingAverage(LATEST_WEIGHT)
        average.note(took_s)
        self._times[key] = average
        if len(self._times) > CLASSES_LIMIT:
            self._times.popitem(last=False)


class PendingImage:
    """One image that a caller waits for. For the event loop's thread."""

    def __init__(self, generation: Generation, report: Report, clock: Callable[[], float]) -> None:
        self.generation = generation
        self.state: RequestState | None = None
        self.result: asyncio.Future[TimedResult] = asyncio.get_running_loop().create_future()
        self._report = report
        self._clock = clock
        self._since_s = clock()
        self._spans: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        """It is finished, it failed, or its caller has gone."""
        return self.result.done()

    def end_span(self, name: str) -> None:
        """Count the time since the last span's end under this name."""
        now_s = self._clock()
        self._spans[name] = self._spans.get(name, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def report_progress(self, progress: StepProgress) -> None:
        if not self.is_over:
            self._report(progress)

    def release_state(self) -> None:
        """Let go of what only this image kept in the device's memory."""
        self.state = None

    def fail(self, error: BaseException) -> None:
        self.release_state()
        if not self.is_over:
            self.result.set_exception(error)

    def succeed(self, finished: DeviceResult) -> None:
        self.release_state()
        if not self.is_over:
            result = TimedResult(
                pixels=finished.pixels,
                nsfw=finished.nsfw,
                device=finished.device,
                dtype=finished.dtype,
                spans=tuple(self._spans.items()),
            )
            self.result.set_result(result)


class DiffusionEngine:
    """Call `generate` from any task of the event loop in which `run` runs."""

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        *,
        thread: DeviceThread,
        rows_limit: int,
        hold_limit_s: float,
        clock: Callable[[], float],
        family_of: Callable[[CheckpointEntry], str] = lambda entry: entry.base,
    ) -> None:
        """`open_backend` is called on the device thread, at the latest for the first model; `clock` counts seconds.

        `family_of`: the name of a checkpoint's family in step times.
        """
        self._open_backend = open_backend
        self._opened: Backend | None = None
        self._thread = thread
        self._clock = clock
        self._queue: BatchQueue[PendingImage] = BatchQueue(rows_limit=rows_limit, hold_limit_s=hold_limit_s)
        # All that a caller waits for, on the device or not.
        self._pending: set[PendingImage] = set()
        self._arrived = asyncio.Event()
        self._numbers = itertools.count()
        self._family_of = family_of
        self.step_times = StepTimes()
        # The device failed: this process cannot generate any more.
        self.is_lost = False

    async def generate(self, generation: Generation, report: Report) -> TimedResult:
        """The finished image. Cancelling the call takes it off the device before the next evaluation."""
        image = PendingImage(generation, report, self._clock)
        self._pending.add(image)
        self._queue.add(batch_key(generation, number=next(self._numbers)), image)
        self._arrived.set()
        try:
            return await image.result
        finally:
            self._queue.remove(image)
            self._pending.discard(image)

    async def open(self) -> None:
        """Import and open what works on the device, before there is any work for it."""
        (await self._thread.attempt(self._backend)).result()

    async def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry] = ()) -> None:
        """Load models into memory ahead of requests. Raises as the backend does."""
        (await self._thread.attempt(lambda: self._backend().load(checkpoint, controlnets))).result()

    async def run(self) -> None:
        """Generate until cancelled. DeviceLost, also for all who wait: this process cannot generate any more."""
        try:
            await self._run_batches()
        except DeviceLost as error:
            self.is_lost = True
            for image in self._pending:
                image.fail(error)
            raise

    async def _run_batches(self) -> None:
        batch: list[PendingImage] = []
        while True:
            if not batch and not len(self._queue):
                self._arrived.clear()
                await self._arrived.wait()
            await self._join(batch)
            batch = _unfinished(batch)
            if batch:
                await self._advance(batch)
            batch = _unfinished(batch)

    async def _join(self, batch: list[PendingImage]) -> None:
        """Add those whose turn it is to the batch; one that finds no memory beside the batch waits for its end."""
        taken = self._queue.take(now_s=self._clock(), running=len(batch))
        for number, image in enumerate(taken):
            try:
                await self._begin(image)
            except ResourceExhausted as error:
                if batch:
                    self._queue.put_back([each for each in taken[number:] if not each.is_over])
                    return
                image.fail(error)
            batch.append(image)

    async def _begin(self, image: PendingImage) -> None:
        """ResourceExhausted where it finds no memory; other errors fail the image."""
        generation = image.generation
        image.end_span("wait")
        controlnets = [control.controlnet for control in generation.controls]
        if await self._try(image, "load", lambda: self._backend().load(generation.checkpoint, controlnets), joins=True):
            begun = await self._try(image, "prepare", lambda: self._backend().begin(generation), joins=True)
            image.state = begun.result() if begun else None

    async def _advance(self, batch: Sequence[PendingImage]) -> None:
        """One evaluation for all; an error of the whole batch fails each of its images."""
        began_s = self._clock()
        done = await self._thread.attempt(lambda: self._backend().advance([image.state for image in batch]))
        if (error := done.exception()) is not None:
            if isinstance(error, DeviceLost):
                raise error
            for image in batch:
                image.fail(error)
            return
        self._measure(batch[0].generation, self._clock() - began_s)
        for image, advance in zip(batch, done.result(), strict=True):
            if advance.error is not None:
                image.fail(advance.error)
                continue
            image.report_progress(advance.progress)
            if advance.is_finished:
                await self._finish(image)

    async def _finish(self, image: PendingImage) -> None:
        image.end_span("denoise")
        if finished := await self._try(image, "decode", lambda: self._backend().finish(image.state)):
            image.succeed(finished.result())

    async def _try(
        self, image: PendingImage, name: str, work: Callable[[], Result], *, joins: bool = False
    ) -> asyncio.Future[Result] | None:
        """Do one image's work on the device; None where the image is over, before or because of it. DeviceLost.

        `joins`: ResourceExhausted is raised, and the image can be tried again.
        """
        if image.is_over:
            return None
        done = await self._thread.attempt(work)
        image.end_span(name)
        error = done.exception()
        if isinstance(error, DeviceLost) or (joins and isinstance(error, ResourceExhausted)):
            raise error
        if error is not None:
            image.fail(error)
            return None
        return done

    def _backend(self) -> Backend:
        """On the device thread only."""
        if self._opened is None:
            self._opened = self._open_backend()
        return self._opened

    def _measure(self, generation: Generation, took_s: float) -> None:
        """All images of a batch have one checkpoint and size."""
        size = size_class(generation.width_px, generation.height_px)
        self.step_times.note(self._family_of(generation.checkpoint), size, took_s)


def _unfinished(batch: Sequence[PendingImage]) -> list[PendingImage]:
    for image in batch:
        if image.is_over:
            image.release_state()
    return [image for image in batch if not image.is_over]
