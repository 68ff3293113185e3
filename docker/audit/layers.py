"""From a layer's bytes to its entries. Checks both digests; reads every file once."""

import csv
import hashlib
import mmap
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, BinaryIO

from audit.elf import MAGIC, read_elf
from audit.model import AuditError, Elf, Entry, Kind, Layer
from audit.streams import CHUNK, Hashed, unpacked

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
_LIBRARY = re.compile(rb"lib[\w+.-]{1,80}?\.so(?:\.\d+)*")
# Text that may name a library to load.
_SPEAKING = (".py", ".conf", ".json", ".sh")
# tarfile copies what is left of its buffer at every read: a large one is slow.
TAR_BUFFER = 16 * 1024
_RECORD = ".dist-info/RECORD"
_LFS_BYTES_MAX = 1024


def read_layer(source: BinaryIO, *, digest: str, size_bytes: int, diff_id: str, command: str) -> Layer:
    """The layer, or AuditError when its bytes are not what the manifest says. `size_bytes` -1: a bare tar."""
    what = f"layer {digest[:19]}"
    outside = Hashed(source)
    head = outside.read(4) or b""
    try:
        with unpacked(outside, head, what) as stream:  # type: ignore[arg-type]
            inside = Hashed(stream, estimate=size_bytes < 0)
            entries = tuple(_entries(inside))
            inside.drain()
        outside.drain()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise AuditError(f"{what} is damaged or cut short: {error}") from error
    if size_bytes >= 0 and (outside.digest, outside.size_bytes) != (digest, size_bytes):
        raise AuditError(
            f"{what} has {outside.size_bytes} bytes with {outside.digest}; the manifest says {size_bytes} with {digest}"
        )
    if diff_id and inside.digest != diff_id:
        raise AuditError(f"{what} unpacks to {inside.digest}; the config says {diff_id}")
    estimated = size_bytes < 0
    return Layer(
        digest=digest,
        diff_id=inside.digest,
        compressed_bytes=inside.gzip_bytes() if estimated else size_bytes,
        is_estimate=estimated,
        command=command,
        entries=entries,
    )


def _entries(stream: Hashed) -> Iterator[Entry]:
    with tarfile.open(fileobj=stream, mode="r|", bufsize=TAR_BUFFER) as tar:
        for member in tar:
            yield _entry(tar, member)


def _entry(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Entry:
    path = normal(member.name)
    folder, name = posixpath.split(path)
    if name == OPAQUE:
        return Entry(path=folder, kind=Kind.OPAQUE)
    if name.startswith(WHITEOUT):
        return Entry(path=posixpath.join(folder, name.removeprefix(WHITEOUT)), kind=Kind.WHITEOUT)
    if member.isfile():
        return _file(tar, member, path)
    if member.islnk():
        return Entry(path=path, kind=Kind.HARD_LINK, target=normal(member.linkname))
    if member.issym():
        return Entry(path=path, kind=Kind.SYMLINK, target=member.linkname)
    return Entry(path=path, kind=Kind.DIRECTORY if member.isdir() else Kind.OTHER)


def normal(path: str) -> str:
    """Without a leading slash or dots; empty for the root."""
    return posixpath.normpath("/" + path).lstrip("/")


def _file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> Entry:
    source = tar.extractfile(member)
    assert source
    head = source.read(len(LFS_HEAD))
    entry = Entry(
        path=path,
        kind=Kind.FILE,
        size_bytes=member.size,
        is_lfs_pointer=head.startswith(LFS_HEAD) and member.size < _LFS_BYTES_MAX,
    )
    if member.size and (head.startswith(MAGIC) or path.endswith((_RECORD, *_SPEAKING))):
        return _looked_into(entry, head, source)
    return replace(entry, sha256=_hashed(head, source))


def _hashed(head: bytes, source: IO[bytes], copy: IO[bytes] | None = None) -> str:
    hashed = hashlib.sha256()
    chunk = head
    while chunk:
        hashed.update(chunk)
        if copy:
            copy.write(chunk)
        chunk = source.read(CHUNK)
    return hashed.hexdigest()


def _looked_into(entry: Entry, head: bytes, source: IO[bytes]) -> Entry:
    """With what its contents say, which needs them as a whole."""
    with tempfile.TemporaryFile() as kept:
        sha256 = _hashed(head, source, kept)
        elf, mentions = _look(kept, is_elf=head.startswith(MAGIC))
        record = _recorded(kept) if entry.path.endswith(_RECORD) else ()
    return replace(entry, sha256=sha256, elf=elf, mentions=mentions, record=record)


def _recorded(kept: IO[bytes]) -> tuple[str, ...]:
    """The first column of a RECORD; its paths have no commas but in quotes."""
    kept.seek(0)
    text = kept.read().decode(errors="replace")
    return tuple(row[0] for row in csv.reader(text.splitlines()) if row)


def _look(kept: IO[bytes], *, is_elf: bool) -> tuple[Elf | None, frozenset[str]]:
    kept.flush()
    with mmap.mmap(kept.fileno(), 0, access=mmap.ACCESS_READ) as data:
        elf = read_elf(data) if is_elf else None
        names = {match.decode() for match in _LIBRARY.findall(data)}
    own = {elf.soname} if elf and elf.soname else set()
    return elf, frozenset(names - own)
