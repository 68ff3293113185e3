"""Prefetch: models that the gateway asks for, one at a time, most urgent first. Knows no stage and no store."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fanlight.errors import FanlightError
from fanlight.queue.v1 import queue_pb2
from services.kernel.logs import get_logger
from services.worker.ports import Prefetches, Stage

log = get_logger()

# More than a gateway asks for at a time. Also limits how many failures are remembered.
WANTED_LIMIT = 64


class Prefetcher:
    def __init__(self, stage: Stage[Any]) -> None:
        self._stage = stage if isinstance(stage, Prefetches) else None
        self._wanted: list[tuple[str, str]] = []
        self._current: tuple[str, str] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        # Set when a download ended or failed since the last poll began: to be reported to the gateway.
        self.finished = asyncio.Event()
        # Models that could not be fetched, until a later download succeeds.
        self.unfetched: dict[str, None] = {}

    @property
    def is_able(self) -> bool:
        return self._stage is not None

    def want(self, fetches: Sequence[queue_pb2.Fetch]) -> None:
        """Replace the list of wanted models. A more urgent model interrupts the running download."""
        if self._stage is None:
            return
        self._wanted = [(fetch.model, fetch.kind) for fetch in fetches[:WANTED_LIMIT]]
        if self._fetching is not None and self._wanted[:1] != [self._current]:
            self._fetching.cancel()
        self._changed.set()

    async def run(self) -> None:
        """Fetch until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._wanted:
                await self._fetch(self._wanted[0])

    async def _fetch(self, wanted: tuple[str, str]) -> None:
        assert self._stage is not None
        self._current = wanted
        self._fetching = asyncio.create_task(self._download(*wanted))
        try:
            await asyncio.wait([self._fetching])
        finally:
            self._fetching.cancel()
        is_over = not self._fetching.cancelled()
        self._fetching = self._current = None
        if is_over and wanted in self._wanted:
            self._wanted.remove(wanted)

    async def _download(self, model: str, kind: str) -> None:
        assert self._stage is not None
        try:
            await self._stage.prefetch(model, kind)
        except FanlightError as error:
            # A task that needs the model fails by itself, if this worker gets it despite the report.
            log.warning("prefetch_failed", model=model, reason=error.reason)
            self.unfetched[model] = None
            while len(self.unfetched) > WANTED_LIMIT:
                del self.unfetched[next(iter(self.unfetched))]
        else:
            log.info("model_prefetched", model=model)
            self.unfetched.pop(model, None)
        self.finished.set()
