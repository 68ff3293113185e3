"""What an image is made of, as read. Values only."""

from dataclasses import dataclass, field
from enum import StrEnum


class AuditError(Exception):
    """An image cannot be read, or is not what its manifest says; the message says which part and why."""


class Kind(StrEnum):
    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symlink"
    DIRECTORY = "directory"
    WHITEOUT = "whiteout"
    OPAQUE = "opaque whiteout"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Elf:
    """What matters of an executable or a shared library."""

    soname: str
    needed: frozenset[str]
    # Bytes of its .debug_* sections.
    debug_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One path of one layer, without a leading slash."""

    path: str
    kind: Kind
    size_bytes: int = 0
    # Of a file's contents.
    sha256: str = ""
    # Where a link points.
    target: str = ""
    is_lfs_pointer: bool = False
    elf: Elf | None = None
    # Python imports it by name, though it may be called like a library.
    is_python_module: bool = False
    # Names of shared libraries that its contents mention.
    mentions: frozenset[str] = frozenset()
    # Only of the RECORD of a Python distribution: the paths it lists, relative to site-packages.
    record: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    # Of the blob as it travels.
    digest: str
    # Of the tar inside.
    diff_id: str
    compressed_bytes: int
    # An archive held the bare tar: what gzip makes of it.
    is_estimate: bool = False
    # What made it, from the image's history.
    command: str = ""
    entries: tuple[Entry, ...] = field(default=(), repr=False)

    @property
    def unpacked_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries if entry.kind is Kind.FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    name: str
    digest: str
    layers: tuple[Layer, ...]

    @property
    def compressed_bytes(self) -> int:
        return sum(layer.compressed_bytes for layer in self.layers)

    @property
    def unpacked_bytes(self) -> int:
        return sum(layer.unpacked_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Bytes that the image could do without."""

    kind: str
    path: str
    size_bytes: int
    why: str


def finding(kind: str, entry: Entry, why: str) -> Finding:
    """A whole file."""
    return Finding(kind=kind, path=entry.path, size_bytes=entry.size_bytes, why=why)
