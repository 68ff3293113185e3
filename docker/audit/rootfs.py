"""What is left of the layers once they lie on each other, and what lies hidden below."""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from audit.model import Entry, Image, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """A file whose bytes travel although a later layer replaces or deletes it."""

    entry: Entry
    # Index of its layer, and of the one that hides it.
    layer: int
    by: int
    is_deleted: bool


@dataclass(slots=True)
class RootFs:
    """Path to entry, as a container sees it."""

    entries: dict[str, Entry] = field(default_factory=dict)
    # Index of the layer that each path comes from.
    layers: dict[str, int] = field(default_factory=dict)
    hidden: list[Hidden] = field(default_factory=list)

    def files(self) -> Iterator[Entry]:
        return (entry for entry in self.entries.values() if entry.kind is Kind.FILE)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files())


def merge(image: Image) -> RootFs:
    root = RootFs()
    for index, layer in enumerate(image.layers):
        _apply(root, layer.entries, index)
    return root


def _apply(root: RootFs, entries: Iterable[Entry], index: int) -> None:
    """Whiteouts of a layer speak of the layers below, wherever they stand in its archive."""
    listed = list(entries)
    for entry in listed:
        if entry.kind is Kind.WHITEOUT:
            _remove(root, entry.path, index, itself=True)
        elif entry.kind is Kind.OPAQUE:
            _remove(root, entry.path, index, itself=False)
    for entry in listed:
        if entry.kind not in (Kind.WHITEOUT, Kind.OPAQUE):
            _put(root, entry, index)


def _remove(root: RootFs, path: str, index: int, *, itself: bool) -> None:
    inside = f"{path}/" if path else ""
    gone = [p for p in root.entries if (itself and p == path) or p.startswith(inside)]
    for each in gone:
        _hide(root, each, index, is_deleted=True)


def _put(root: RootFs, entry: Entry, index: int) -> None:
    before = root.entries.get(entry.path)
    if before is not None and before.kind is Kind.DIRECTORY and entry.kind is not Kind.DIRECTORY:
        _remove(root, entry.path, index, itself=False)
    if before is not None:
        _hide(root, entry.path, index, is_deleted=False)
    root.entries[entry.path] = entry
    root.layers[entry.path] = index


def _hide(root: RootFs, path: str, index: int, *, is_deleted: bool) -> None:
    entry = root.entries.pop(path)
    layer = root.layers.pop(path)
    if entry.kind is Kind.FILE and entry.size_bytes:
        root.hidden.append(Hidden(entry=entry, layer=layer, by=index, is_deleted=is_deleted))


def folder(path: str) -> str:
    return posixpath.dirname(path)
