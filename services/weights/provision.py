"""Weights for a worker: fetched when a task needs them, kept while it uses them. Knows no stage and no wire.

One for each process. The store is opened when something is asked for, so a worker that asks for nothing opens nothing.
"""

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

from fanlight.errors import NodeFault
from services.kernel.logs import get_logger
from services.weights.references.references import parse
from services.weights.settings import WeightsSettings
from services.weights.store.index import INDEX_FILE, HeldModel, Index, held_models
from services.weights.store.store import WeightStore
from services.weights.transfer.download import DownloadProgress

log = get_logger()


class Inventory:
    """Read again only when the store's index has changed, by whichever process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX_FILE
        self._held: Sequence[HeldModel] = ()
        self._seen: tuple[object, ...] = ()

    def look(self) -> Sequence[HeldModel]:
        """What is held now; nothing where no store was ever opened."""
        seen = self._stamps()
        if seen != self._seen:
            try:
                self._held = held_models(Index(self._path)) if self._path.exists() else ()
            except sqlite3.Error as error:
                # Better an old answer than no poll.
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
    """Use as an async context manager, on the event loop that asks."""

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
        """The process's store, opened on first use. NodeFault where its folder cannot be used."""
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
        """The path to load the reference from; fetched first where it is not held, and not evicted while this is open.

        `report` is called on the event loop while bytes come, its `whole` over all files. Askers share one download.
        NotHeld when nothing may be fetched; InvalidField, NotFound, SourceFailed, WrongBytes, TokenRefused, DiskFull.
        """
        parse(reference)
        async with (await self.store()).acquire(reference, pipeline, report=report) as path:
            yield path

    def inventory(self) -> Sequence[HeldModel]:
        """What is on this node's disk and whole; cheap enough for every poll. Opens nothing where nothing is."""
        return self._inventory.look()

    @property
    def room_bytes(self) -> int:
        """What may be filled with weights that nobody has asked for; 0 where the operator has capped the link.

        The budget, or where there is none, what is held and what is free.
        """
        settings = self._settings
        if settings.offline or settings.bandwidth_bps or settings.daily_bytes:
            return 0
        return settings.budget_bytes or _held_bytes(self.inventory()) + _free_bytes(settings.dir)

    @property
    def link_bps(self) -> float:
        """What the link has lately given, in bits a second; 0 until something large was fetched."""
        return self._store.link_bps if self._store else 0.0


def _held_bytes(models: Sequence[HeldModel]) -> int:
    """At most: what two models share counts twice."""
    return sum(model.size_bytes for model in models)


def _free_bytes(folder: Path) -> int:
    """Of the disk that the folder is on, or will be on."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(there).free
