"""Networks in memory: loaded on first use (single flight), evicted least recently used first, pinned while in use.

Images that wait for the same network on a GPU go through it as one batch. Knows no annotator's internals.
"""

import asyncio
import contextlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from fanlight.contract.parameters import canonical
from services.kernel.logs import get_logger
from services.preprocessor.annotation import Annotation
from services.preprocessor.annotator import ControlMap, Pixels
from services.preprocessor.config import CUDA, AnnotatorDevice
from services.preprocessor.faults import names_files
from services.preprocessor.weights import AnnotatorWeights, OnProgress, Weights, ignore_progress

log = get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Sequence[Item]], Sequence[Result]]


@dataclass(eq=False, slots=True, kw_only=True)
class _Call(Generic[Item, Result]):
    key: object
    item: Item
    result: list[Result] = field(default_factory=list)
    error: BaseException | None = None
    is_done: bool = False


class MicroBatcher(Generic[Item, Result]):
    """Lets one thread at a time work; it takes the waiting calls of an equal key along as one batch. Blocking."""

    def __init__(self, *, batch_limit: int) -> None:
        self._batch_limit = batch_limit
        self._changed = threading.Condition()
        self._waiting: list[_Call[Item, Result]] = []
        self._is_busy = False

    def run(self, key: object, item: Item, work: Work[Item, Result]) -> Result:
        """The result of `work` for the item, perhaps computed in a batch with others. Raises what `work` raises."""
        call: _Call[Item, Result] = _Call(key=key, item=item)
        batch = self._wait(call)
        if batch:
            self._run_batch(batch, work)
        if call.error is not None:
            raise call.error
        return call.result[0]

    def _wait(self, call: _Call[Item, Result]) -> list[_Call[Item, Result]]:
        """The calls to work for, this one first; empty if another thread has done this one meanwhile."""
        with self._changed:
            self._waiting.append(call)
            self._changed.wait_for(lambda: call.is_done or not self._is_busy)
            if call.is_done:
                return []
            self._is_busy = True
            alike = [other for other in self._waiting if other is not call and other.key == call.key]
            batch = [call, *alike[: self._batch_limit - 1]]
            self._waiting = [other for other in self._waiting if other not in batch]
            return batch

    def _run_batch(self, batch: list[_Call[Item, Result]], work: Work[Item, Result]) -> None:
        try:
            _run_calls(batch, work)
        finally:
            with self._changed:
                for call in batch:
                    call.is_done = True
                self._is_busy = False
                self._changed.notify_all()


def _run_calls(batch: list[_Call[Item, Result]], work: Work[Item, Result]) -> None:
    """A batch that fails is run again one by one, so that no call gets another call's error."""
    try:
        results = work([call.item for call in batch])
        for call, result in zip(batch, results, strict=True):
            call.result.append(result)
    except BaseException as error:
        if len(batch) == 1:
            batch[0].error = error
            return
        for call in batch:
            call.result.clear()
            _run_calls([call], work)


def _build(weights: AnnotatorWeights, folder: Path, device: AnnotatorDevice) -> Any:
    """The network. NetworkNotBuilt, also for the StopIteration of weights that end too early, which no future takes."""
    with names_files(weights, folder):
        return weights.build(folder, device)


class LoadedNetwork:
    """A network in memory, with the batcher in front of it. `pins`: how many annotations use it now."""

    def __init__(
        self, weights: AnnotatorWeights, network: Any, device: AnnotatorDevice, *, folder: Path, batch_limit: int
    ) -> None:
        self.weights = weights
        self._folder = folder
        self.network = network
        self.device = device.label
        # One image keeps a CPU busy already; alone, each has the same map whatever else waits.
        self.batch_limit = batch_limit if device.kind == CUDA else 1
        self.pins = 0
        self._batcher: MicroBatcher[Pixels, ControlMap] = MicroBatcher(batch_limit=self.batch_limit)

    @cached_property
    def altered_files(self) -> tuple[str, ...]:
        """Asked for after a failure alone: it reads the files again."""
        return self.weights.altered_files(self._folder)

    def draw(self, annotation: Annotation, image: Pixels) -> ControlMap:
        """The map of an image (H, W, 3) uint8; images of one shape for one annotator may share a batch."""
        annotator, parameters = annotation.annotator, annotation.own_parameters
        key = (annotator.id, canonical(parameters), image.shape)
        return self._batcher.run(key, image, lambda images: annotator.draw(images, self.network, **parameters))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorCacheLimits:
    # Of all weights in memory; those in use count too, and are never evicted.
    size_bytes: int = 6_000_000_000
    # Images of one shape that go through a network on a GPU in one batch.
    batch: int = 4


class AnnotatorCache:
    """For one event loop; what blocks runs in the executor.

    Not kernel's ByteLru: a network in use is pinned even if the cache is over its limit, and one that is larger than
    the whole cache must be kept until its annotation ends.
    """

    def __init__(
        self, weights: Weights, device: AnnotatorDevice, executor: Executor, *, limits: AnnotatorCacheLimits
    ) -> None:
        self._weights = weights
        self._device = device
        self._executor = executor
        self._limits = limits
        # The least recently used first.
        self._loaded: OrderedDict[str, LoadedNetwork] = OrderedDict()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __contains__(self, weights: AnnotatorWeights) -> bool:
        return weights.name in self._loaded

    @property
    def size_bytes(self) -> int:
        return sum(each.weights.size_bytes for each in self._loaded.values())

    @contextlib.asynccontextmanager
    async def use(
        self, weights: AnnotatorWeights, report: OnProgress = ignore_progress
    ) -> AsyncIterator[LoadedNetwork]:
        """The loaded network, pinned while this is open. FanlightError if its weights are not available."""
        async with self._locks[weights.name]:
            loaded = self._loaded.get(weights.name) or await self._load(weights, report)
            loaded.pins += 1
        self._loaded.move_to_end(weights.name)
        try:
            yield loaded
        finally:
            loaded.pins -= 1
            self._evict(0)

    async def _load(self, weights: AnnotatorWeights, report: OnProgress) -> LoadedNetwork:
        self._evict(weights.size_bytes)
        loop = asyncio.get_running_loop()
        async with self._weights.folder(weights, report) as folder:
            device = weights.device(self._device)
            log.info("model_loading", model=weights.name, size_bytes=weights.size_bytes, device=device.label)
            network = await loop.run_in_executor(self._executor, _build, weights, folder, device)
        loaded = LoadedNetwork(weights, network, device, folder=folder, batch_limit=self._limits.batch)
        self._loaded[weights.name] = loaded
        return loaded

    def _evict(self, needed_bytes: int) -> None:
        """Evict the least recently used until `needed_bytes` fit, or until only pinned networks are left."""
        for name, loaded in list(self._loaded.items()):
            if self.size_bytes + needed_bytes <= self._limits.size_bytes:
                return
            if not loaded.pins:
                del self._loaded[name]
                log.info("model_evicted", model=name, size_bytes=loaded.weights.size_bytes)
