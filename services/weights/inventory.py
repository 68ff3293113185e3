"""What a store holds, by name and size, for people and for a worker's reports. Fetches nothing."""

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.kernel.logs import get_logger
from services.weights.index import INDEX_FILE, Index

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A view that has all its files; `references` are those that it was fetched by."""

    name: str
    size_bytes: int
    is_pinned: bool
    used_s: float
    references: tuple[str, ...] = ()


def held_models(index: Index) -> list[HeldModel]:
    """Every view that has all its files. Blocking, for milliseconds."""
    rows = {row.sha256: row for row in index.objects()}
    views: dict[str, list[str]] = defaultdict(list)
    for view, _, sha in index.links():
        views[view].append(sha)
    names: dict[str, list[str]] = defaultdict(list)
    for reference, view in index.names():
        names[view].append(reference)
    return [
        HeldModel(
            name=view,
            size_bytes=sum(rows[sha].size_bytes for sha in set(shas)),
            is_pinned=all(rows[sha].is_pinned for sha in shas),
            used_s=max(rows[sha].used_s for sha in shas),
            references=tuple(names[view]),
        )
        for view, shas in views.items()
        if all(sha in rows for sha in shas)
    ]


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
