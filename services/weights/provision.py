"""Weights for a worker: fetched when a task needs them, protected from eviction while in use.

One per process. The store is opened on first use. Knows no stage and no wire format.
"""

import asyncio
import contextlib
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

from fanlight.errors import FanlightError, NodeFault
from services.kernel.logs import get_logger
from services.weights.references.references import parse
from services.weights.settings import WeightsSettings
from services.weights.store.index import INDEX_FILE, HeldModel, Index, held_models
from services.weights.store.store import WeightStore
from services.weights.transfer.download import DownloadProgress

log = get_logger()


class Inventory:
    """The models in a store, read again only after its index changed, by any process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX_FILE
        self._held: Sequence[HeldModel] = ()
        self._seen: tuple[object, ...] = ()

    def read(self) -> Sequence[HeldModel]:
        """The models held now; empty if no store was ever opened there."""
        seen = self._stamps()
        if seen != self._seen:
            try:
                self._held = held_models(Index(self._path)) if self._path.exists() else ()
            except (sqlite3.Error, OSError, FanlightError) as error:
                # A stale inventory is better than no poll.
                log.warning("weights_index_unreadable", why=str(error))
            self._seen = seen
        return self._held

    def _stamps(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in (self._path, self._path.with_name(f"{INDEX_FILE}-wal")))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class Provision:
    """Use as an async context manager, on the event loop of its callers."""

    def __init__(self, settings: WeightsSettings) -> None:
        self._settings = settings
        self._inventory = Inventory(settings.dir)
        self._stack = contextlib.AsyncExitStack()
        self._opening = asyncio.Lock()
        self._store: WeightStore | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def store(self) -> WeightStore:
        """The process's store, opened on first use. NodeFault if its folder cannot be used."""
        async with self._opening:
            if self._store is None:
                try:
                    self._store = await self._stack.enter_async_context(WeightStore.open(self._settings))
                except (OSError, sqlite3.Error) as error:
                    raise NodeFault(f"FANLIGHT_WEIGHTS_DIR {self._settings.dir} cannot be used: {error}") from error
                log.info("weights_opened", folder=str(self._settings.dir), offline=self._settings.offline)
            return self._store

    @contextlib.asynccontextmanager
    async def obtain(
        self, reference: str, pipeline: str = "", *, report: Callable[[DownloadProgress], None] = lambda progress: None
    ) -> AsyncIterator[Path]:
        """The path to load the reference from; fetched first if it is not held, not evicted while this is open.

        `report` is called on the event loop as bytes arrive; its `whole` is over all files. Callers share one download.
        NotHeld when nothing may be fetched; InvalidField, NotFound, SourceFailed, WrongBytes, TokenRefused, DiskFull;
        NodeFault where the store itself fails.
        """
        parse(reference)
        store = await self.store()
        async with contextlib.AsyncExitStack() as held:
            try:
                path = await held.enter_async_context(store.acquire(reference, pipeline, report=report))
            except (OSError, sqlite3.Error) as error:
                log.warning("weights_store_failed", reference=reference.split("?")[0], why=repr(error))
                raise NodeFault(
                    "the store of weights cannot be used: its disk or index is damaged or not writable; see the log"
                ) from error
            yield path

    def inventory(self) -> Sequence[HeldModel]:
        """Complete models on this node's disk; cheap enough for every poll. Does not create a store."""
        return self._inventory.read()

    @property
    def room_bytes(self) -> int:
        """Disk space that prefetched weights may fill; 0 if offline, read-only, or if the operator capped the link.

        The budget; without one, held bytes plus free disk space.
        """
        settings = self._settings
        if settings.offline or settings.bandwidth_bps or settings.daily_bytes or not _is_writable(settings.dir):
            return 0
        return settings.budget_bytes or _held_bytes(self.inventory()) + _free_bytes(settings.dir)

    @property
    def link_bps(self) -> float:
        """Measured goodput of the link, in bits per second; 0 until something large was fetched."""
        return self._store.link_bps if self._store else 0.0


def _held_bytes(models: Sequence[HeldModel]) -> int:
    """An upper bound: objects shared by two models count twice."""
    return sum(model.size_bytes for model in models)


def _free_bytes(folder: Path) -> int:
    """Free space of the disk that the folder is on, or will be on."""
    return shutil.disk_usage(_existing(folder)).free


def _is_writable(folder: Path) -> bool:
    return os.access(_existing(folder), os.W_OK)


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())
