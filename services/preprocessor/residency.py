"""Models in memory: loaded on first use, kept while there is room, dropped by bytes, never while in use.

For one event loop; what blocks runs in the executor. Knows no annotator's inside.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from fanlight.contract.parameters import canonical
from services.kernel.logs import get_logger
from services.preprocessor.annotation import Annotation
from services.preprocessor.annotator import Drawn, Pixels
from services.preprocessor.device import CUDA, Device
from services.preprocessor.lanes import Lane
from services.preprocessor.weights import Model, Tell, Weights, tell_nobody

log = get_logger()


class Loaded:
    """A model in memory, and the lane before it."""

    def __init__(self, model: Model, network: Any, device: Device, *, batch_limit: int) -> None:
        self.model = model
        self.device = device.label
        # A CPU is busy with one picture already, and each comes out the same whatever else waits with it.
        self.batch_limit = batch_limit if device.kind == CUDA else 1
        self._network = network
        self._lane: Lane[Pixels, Drawn] = Lane(batch_limit=self.batch_limit)
        self.users = 0
        self.used_at = 0

    def draw(self, asked: Annotation, picture: Pixels) -> Drawn:
        parameters = asked.own_parameters
        key = (asked.annotator.id, canonical(parameters), picture.shape)
        return self._lane.run(
            key, picture, lambda pictures: asked.annotator.draw(pictures, self._network, **parameters)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyLimits:
    # Of weights in memory together; what is in use counts too, and is never dropped.
    bytes: int = 6_000_000_000
    # Pictures of one shape that go through a network on a GPU together.
    batch: int = 4


class Residency:
    def __init__(
        self,
        weights: Weights,
        device: Device,
        executor: Executor,
        *,
        limits: ResidencyLimits,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = device
        self._weights = weights
        self._executor = executor
        self._limits = limits
        self._changed = changed
        self._loaded: dict[str, Loaded] = {}
        self._doors: dict[str, asyncio.Lock] = {}
        self._uses = 0

    def holds(self, model: Model) -> bool:
        return model.name in self._loaded

    @property
    def size_bytes(self) -> int:
        return sum(each.model.size_bytes for each in self._loaded.values())

    @contextlib.asynccontextmanager
    async def use(self, model: Model, tell: Tell = tell_nobody) -> AsyncIterator[Loaded]:
        """The loaded model, not dropped while this is open. FanlightError where its weights are not to be had."""
        async with self._doors.setdefault(model.name, asyncio.Lock()):
            loaded = self._loaded.get(model.name) or await self._load(model, tell)
            loaded.users += 1
        self._uses += 1
        loaded.used_at = self._uses
        try:
            yield loaded
        finally:
            loaded.users -= 1
            self._make_room(0)

    async def _load(self, model: Model, tell: Tell) -> Loaded:
        self._make_room(model.size_bytes)
        loop = asyncio.get_running_loop()
        async with self._weights.folder(model, tell) as folder:
            device = model.device(self.device)
            log.info("model_loading", model=model.name, size_bytes=model.size_bytes, device=device.label)
            network = await loop.run_in_executor(self._executor, model.build, folder, device)
        loaded = Loaded(model, network, device, batch_limit=self._limits.batch)
        self._loaded[model.name] = loaded
        self._changed()
        return loaded

    def _make_room(self, wanted_bytes: int) -> None:
        """Drop those that were not used for longest, until what is wanted fits or all that is left is in use."""
        for loaded in sorted(self._loaded.values(), key=lambda each: each.used_at):
            if self.size_bytes + wanted_bytes <= self._limits.bytes:
                return
            if not loaded.users:
                del self._loaded[loaded.model.name]
                log.info("model_dropped", model=loaded.model.name, size_bytes=loaded.model.size_bytes)
                self._changed()
