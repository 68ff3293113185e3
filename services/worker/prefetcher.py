"""Fetches models ahead, as the gateway says: one after the other, most urgent first. Knows no stage and no store."""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from fanlight.errors import FanlightError
from fanlight.queue.v1 import queue_pb2
from services.kernel.logs import get_logger
from services.worker.ports import Stage

log = get_logger()

# More than a gateway asks for at a time.
WANTED_LIMIT = 64


@runtime_checkable
class FetchesAhead(Protocol):
    """A stage that can bring models to this machine before a task needs them."""

    async def fetch_ahead(self, model: str, kind: str) -> None:
        """Return once it is on disk. Cancelled, it may go on from there the next time. Raises FanlightError."""
        ...


class Prefetcher:
    def __init__(self, stage: Stage[Any]) -> None:
        self._stage = stage if isinstance(stage, FetchesAhead) else None
        self._wanted: list[tuple[str, str]] = []
        self._current: tuple[str, str] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._stirred = asyncio.Event()
        # Something came, or could not, since the last poll began: the gateway should hear of it.
        self.came = asyncio.Event()
        # What could not be fetched, until it is wanted and comes.
        self.unfetched: dict[str, None] = {}

    @property
    def is_able(self) -> bool:
        return self._stage is not None

    def want(self, fetches: Sequence[queue_pb2.Fetch]) -> None:
        """In place of all that was wanted before; what is under way is interrupted for what is more urgent."""
        if self._stage is None:
            return
        self._wanted = [(fetch.model, fetch.kind) for fetch in fetches[:WANTED_LIMIT]]
        if self._fetching is not None and self._wanted[:1] != [self._current]:
            self._fetching.cancel()
        self._stirred.set()

    async def run(self) -> None:
        """Fetch until cancelled."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while self._wanted:
                await self._fetch(self._wanted[0])

    async def _fetch(self, wanted: tuple[str, str]) -> None:
        assert self._stage is not None
        self._current = wanted
        self._fetching = asyncio.create_task(self._bring(*wanted))
        try:
            await asyncio.wait([self._fetching])
        finally:
            self._fetching.cancel()
        is_over = not self._fetching.cancelled()
        self._fetching = self._current = None
        if is_over and wanted in self._wanted:
            self._wanted.remove(wanted)

    async def _bring(self, model: str, kind: str) -> None:
        assert self._stage is not None
        try:
            await self._stage.fetch_ahead(model, kind)
        except FanlightError as error:
            # The task that needs it will say so, if it is given to this worker all the same.
            log.warning("fetch_ahead_failed", model=model, reason=error.reason)
            self.unfetched[model] = None
            while len(self.unfetched) > WANTED_LIMIT:
                del self.unfetched[next(iter(self.unfetched))]
        else:
            log.info("fetched_ahead", model=model)
            self.unfetched.pop(model, None)
        self.came.set()
