"""The engine: images in batches on one device thread, which they join and leave between evaluations of the model.

Knows no torch and no protobuf: a Backend does the work.
"""

import asyncio
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fanlight.contract.limits import size_class
from fanlight.errors import ResourceExhausted
from services.diffusion.engine.batching import BatchQueue, batch_key
from services.diffusion.engine.generation import Generation
from services.diffusion.engine.ports import (
    Backend,
    DeviceResult,
    Report,
    RequestState,
    StepProgress,
    TimedResult,
)
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.models.faults import part_of_device
from services.kernel.averages import MovingAverage
from services.worker.device import DeviceLost, HangLimits, HangWatch

# How much the latest evaluation's time counts against those before.
LATEST_WEIGHT = 0.2
# For how many families and sizes step times are kept: those measured last.
CLASSES_LIMIT = 32
Result = TypeVar("Result")


class DeviceThread:
    """The one thread that owns the device."""

    def __init__(self, watch: HangWatch | None = None) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._watch = watch or HangWatch()

    @property
    def limits(self) -> HangLimits:
        return self._watch.limits

    async def attempt(self, work: Callable[[], Result], *, limit_s: float) -> asyncio.Future[Result]:
        """Run `work` on the thread and return its finished future: an error is stored in it, not raised.

        DeviceLost if the work has not ended `limit_s` after it began.
        """
        begun = threading.Event()

        def begin() -> Result:
            begun.set()
            return work()

        future = asyncio.get_running_loop().run_in_executor(self._executor, begin)
        if not await self._watch.has_finished(future, has_begun=begun.is_set, limit_s=limit_s):
            raise DeviceLost(f"the device has hung: no result after {limit_s:.0f} s; the worker's process starts again")
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

    def mean_s(self, family: str, size_class: int) -> float | None:
        """None where it was not measured."""
        average = self._times.get((family, size_class))
        return average.mean if average else None

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
                warnings=finished.warnings,
                vae_dtype=finished.vae_dtype,
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
        device_name: Callable[[], str] = lambda: "",
        on_lost: Callable[[DeviceLost], None] = lambda error: None,
    ) -> None:
        """`open_backend` is called on the device thread, at the latest for the first model; `clock` counts seconds.

        `family_of`: the name of a checkpoint's family in step times. `device_name`: empty while unknown.
        `on_lost`: called when the device is lost, whatever it did then.
        """
        self._device_name = device_name
        self._on_lost = on_lost
        self._lost: DeviceLost | None = None
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

    @property
    def is_lost(self) -> bool:
        """The device failed or hangs: this process cannot generate any more."""
        return self._lost is not None

    async def generate(self, generation: Generation, report: Report) -> TimedResult:
        """The finished image. Cancelling the call takes it off the device before the next evaluation. DeviceLost."""
        if self._lost is not None:
            raise self._lost
        image = PendingImage(generation, report, self._clock)
        self._pending.add(image)
        self._queue.add(batch_key(generation, number=next(self._numbers)), image, rows=generation.rows)
        self._arrived.set()
        try:
            return await image.result
        finally:
            self._queue.remove(image)
            self._pending.discard(image)

    async def open(self) -> None:
        """Import and open what works on the device, before there is any work for it."""
        (await self._attempt(self._backend)).result()

    async def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry] = ()) -> None:
        """Load models into memory ahead of requests. Raises as the backend does."""
        (await self._attempt(lambda: self._backend().load(checkpoint, controlnets))).result()

    async def run(self) -> None:
        """Generate until cancelled. DeviceLost, also for all who wait: this process cannot generate any more."""
        await self._run_batches()

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
        taken = self._queue.take(now_s=self._clock(), running=_rows(batch))
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
        measured_s = self.step_times.mean_s(*self._class_of(batch[0].generation))
        done = await self._attempt(
            lambda: self._backend().advance([image.state for image in batch]),
            limit_s=self._thread.limits.limit_s(measured_s, items=_rows(batch)),
        )
        if (error := done.exception()) is not None:
            for image in batch:
                image.fail(error)
            return
        self._measure(batch[0].generation, self._clock() - began_s)
        for image, advance in zip(batch, done.result(), strict=True):
            if advance.error is not None:
                image.fail(advance.error)
                continue
            if advance.is_again:
                begun = await self._try(image, "prepare", partial(self._backend().begin_again, image.state))
                image.state = begun.result() if begun else None
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
        done = await self._attempt(work)
        image.end_span(name)
        error = done.exception()
        if joins and isinstance(error, ResourceExhausted):
            raise error
        if error is not None:
            image.fail(error)
            return None
        return done

    async def _attempt(self, work: Callable[[], Result], *, limit_s: float | None = None) -> asyncio.Future[Result]:
        """As the device thread's. DeviceLost, also for all who wait or come later: nothing works on it any more."""
        try:
            done = await self._thread.attempt(work, limit_s=limit_s or self._thread.limits.limit_s(None))
            if isinstance(error := done.exception(), DeviceLost):
                raise error
        except DeviceLost as error:
            self._lost = error.of_part(part_of_device(self._device_name()))
            for image in self._pending:
                image.fail(error)
            self._on_lost(error)
            raise
        return done

    def _backend(self) -> Backend:
        """On the device thread only."""
        if self._opened is None:
            self._opened = self._open_backend()
        return self._opened

    def _measure(self, generation: Generation, took_s: float) -> None:
        self.step_times.note(*self._class_of(generation), took_s)

    def _class_of(self, generation: Generation) -> tuple[str, int]:
        """Family and size class; all images of a batch have one checkpoint and size."""
        return self._family_of(generation.checkpoint), size_class(generation.width_px, generation.height_px)


def _rows(batch: Sequence[PendingImage]) -> int:
    return sum(image.generation.rows for image in batch)


def _unfinished(batch: Sequence[PendingImage]) -> list[PendingImage]:
    for image in batch:
        if image.is_over:
            image.release_state()
    return [image for image in batch if not image.is_over]
