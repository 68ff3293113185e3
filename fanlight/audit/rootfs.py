"""What is left of the layers once they lie on each other, and what lies hidden below."""

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .model import Entry, Image, Kind


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
    # Folder to the names that ever lay in it, whether or not a layer lists the folder itself.
    _names: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    # File to the hard links that share its bytes, and back.
    _links: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _linked: dict[str, str] = field(default_factory=dict)

    def files(self) -> Iterator[Entry]:
        return (entry for entry in self.entries.values() if entry.kind is Kind.FILE)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files())

    def under(self, folder: str) -> Iterator[str]:
        """Every path that is there below a folder; empty for the root."""
        waiting = [folder]
        while waiting:
            above = waiting.pop()
            paths = [f"{above}/{name}" if above else name for name in self._names.get(above, ())]
            yield from (path for path in paths if path in self.entries)
            waiting += paths

    def put(self, entry: Entry, index: int) -> None:
        self.entries[entry.path] = entry
        self.layers[entry.path] = index
        self._name(entry.path)
        if entry.kind is Kind.HARD_LINK:
            target = self._linked.get(entry.target, entry.target)
            self._links[target].add(entry.path)
            self._linked[entry.path] = target

    def _name(self, path: str) -> None:
        while path:
            above, _, name = path.rpartition("/")
            if name in self._names[above]:
                return
            self._names[above].add(name)
            path = above

    def hide(self, gone: dict[str, bool], index: int) -> None:
        """Take away what a layer hides, path to whether it is deleted. A hard link that stays keeps the bytes."""
        for path in gone:
            self._links[self._linked.pop(path, "")].discard(path)
        for path, is_deleted in gone.items():
            entry, layer = self.entries.pop(path), self.layers.pop(path)
            if entry.kind is Kind.FILE and not self._handed_on(entry) and entry.size_bytes:
                self.hidden.append(Hidden(entry=entry, layer=layer, by=index, is_deleted=is_deleted))

    def _handed_on(self, entry: Entry) -> bool:
        """Whether a hard link has become the file."""
        first, *others = sorted(self._links.pop(entry.path, ())) or [""]
        if not first:
            return False
        del self._linked[first]
        self.entries[first] = replace(entry, path=first)
        self._links[first] = set(others)
        self._linked.update(dict.fromkeys(others, first))
        return True


def merge(image: Image) -> RootFs:
    root = RootFs()
    for index, layer in enumerate(image.layers):
        _apply(root, layer.entries, index)
    return root


def _apply(root: RootFs, entries: Sequence[Entry], index: int) -> None:
    """Whiteouts of a layer speak of the layers below, wherever they stand in its archive."""
    root.hide(_gone(root, entries), index)
    for entry in entries:
        if entry.kind not in (Kind.WHITEOUT, Kind.OPAQUE):
            # The same path twice in one archive: the last one stays.
            root.hide(_replaced(root, entry), index)
            root.put(entry, index)


def _gone(root: RootFs, entries: Iterable[Entry]) -> dict[str, bool]:
    """What a layer takes from the layers below: path to whether it is gone for good."""
    gone: dict[str, bool] = {}
    replaced: dict[str, bool] = {}
    for entry in entries:
        if entry.kind in (Kind.WHITEOUT, Kind.OPAQUE):
            if entry.kind is Kind.WHITEOUT and entry.path in root.entries:
                gone[entry.path] = True
            gone.update(dict.fromkeys(root.under(entry.path), True))
        else:
            replaced.update(_replaced(root, entry))
    return gone | replaced


def _replaced(root: RootFs, entry: Entry) -> dict[str, bool]:
    """What must go so that the entry can be there: only a folder that stays one keeps what is in it."""
    gone = {entry.path: False} if entry.path in root.entries else {}
    if entry.kind is not Kind.DIRECTORY:
        gone.update(dict.fromkeys(root.under(entry.path), True))
    return gone


def folder(path: str) -> str:
    return posixpath.dirname(path)
