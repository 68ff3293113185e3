"""From a layer's bytes to its entries. Checks both digests; reads every file once."""

import csv
import hashlib
import io
import lzma
import mmap
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.client import HTTPException
from typing import IO, Any, BinaryIO, cast

from .elf import MAGIC, read_elf
from .model import AuditError, Entry, Kind, Layer
from .streams import CHUNK, HEAD_BYTES, Hashed, hash_of, is_packed, unpacked

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
_LIBRARY = re.compile(rb"lib[\w+.-]{1,80}?\.so(?:\.\d+)*")
_FIND_LIBRARY = re.compile(rb"find_library\(\s*[\"']([\w+.-]{1,80})[\"']")
# Text that may name a library to load.
_SPEAKING = (".py", ".conf", ".json", ".sh")
_SCRIPT = b"#!"
# tarfile copies what is left of its buffer at every read: a large one is slow.
TAR_BUFFER = 16 * 1024
_RECORD = ".dist-info/RECORD"
_LFS_BYTES_MAX = 1024
# A smaller sparse file is read like any other, so that the same contents have the same digest.
SPARSE_READ_BYTES_MAX = 16 << 20


def read_layer(
    source: BinaryIO, *, digest: str, size_bytes: int, diff_id: str, command: str, exact: bool = True
) -> Layer:
    """The layer, or AuditError when its bytes are not what the manifest says.

    `size_bytes` -1: an archive's layer, of which nobody says how large it is. `exact` False: only the packed bytes have
    to be right, as with zstd:chunked, whose padding is not always that of the tar that it was made from.
    """
    what = f"layer {digest[:19]}"
    is_told = size_bytes >= 0
    outside = Hashed(source, hash_of(digest))
    head = outside.read(HEAD_BYTES) or b""
    was_packed = is_packed(head)
    try:
        with unpacked(outside, head, what) as stream:  # type: ignore[arg-type]
            inside = Hashed(stream, hash_of(diff_id or digest), estimate=not is_told and not was_packed)
            entries, end = _entries(inside)
            inside.drain()
        outside.drain()
    except (tarfile.TarError, csv.Error, EOFError, lzma.LZMAError, zlib.error, OSError, HTTPException) as error:
        raise AuditError(f"{what} is damaged or cut short: {error}") from error
    if is_told and (outside.digest, outside.size_bytes) != (digest, size_bytes):
        raise AuditError(
            f"{what} has {outside.size_bytes} bytes with {outside.digest}; the manifest says {size_bytes} with {digest}"
        )
    if exact and diff_id and inside.digest != diff_id:
        raise AuditError(f"{what} unpacks to {inside.digest}; the config says {diff_id}")
    if inside.content_bytes > end:
        raise AuditError(f"{what} is damaged: its tar cannot be read beyond byte {end}")
    return Layer(
        digest=digest if is_told or not was_packed else outside.digest,
        diff_id=diff_id if diff_id and not exact else inside.digest,
        compressed_bytes=inside.gzip_bytes() if not is_told and not was_packed else outside.size_bytes,
        is_estimate=not is_told and not was_packed,
        command=command,
        entries=entries,
    )


def _entries(stream: Hashed) -> tuple[tuple[Entry, ...], int]:
    """All of them, and where the tar ends: tarfile takes a damaged header for that, too."""
    with tarfile.open(fileobj=stream, mode="r|", bufsize=TAR_BUFFER) as tar:
        entries = tuple(_entry(tar, member) for member in _members(tar))
        return entries, tar.offset


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """One at a time: of an archive with many, tarfile would keep them all."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        yield member


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
    if member.issparse() and member.size > SPARSE_READ_BYTES_MAX:
        return Entry(path=path, kind=Kind.FILE, size_bytes=member.size, sha256=_hashed_parts(member, source))
    head = source.read(len(LFS_HEAD))
    entry = Entry(
        path=path,
        kind=Kind.FILE,
        size_bytes=member.size,
        is_lfs_pointer=head.startswith(LFS_HEAD) and member.size < _LFS_BYTES_MAX,
    )
    if member.size and (head.startswith((MAGIC, _SCRIPT)) or path.endswith((_RECORD, *_SPEAKING))):
        return _looked_into(entry, head, source)
    return replace(entry, sha256=_hashed(head, source))


def _hashed_parts(member: tarfile.TarInfo, source: IO[bytes]) -> str:
    """Of where the data lies in a sparse file and of the data: its holes may be terabytes, and are not read."""
    hashed = hashlib.sha256(f"sparse {member.size}".encode())
    # Without the buffer, which would seek in a stream.
    inner: io.RawIOBase = cast(Any, source).raw
    segments: Sequence[tuple[int, int]] = cast(Any, member).sparse
    for begin, size in segments:
        hashed.update(f" {begin} {size} ".encode())
        inner.seek(begin)
        left = size
        while left > 0 and (chunk := inner.read(min(CHUNK, left))):
            hashed.update(chunk)
            left -= len(chunk)
    return hashed.hexdigest()


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
        kept.flush()
        # A RECORD names what was installed, and loads nothing.
        if entry.path.endswith(_RECORD):
            return replace(entry, sha256=sha256, record=_recorded(kept))
        with mmap.mmap(kept.fileno(), 0, access=mmap.ACCESS_READ) as data:
            elf = read_elf(data) if head.startswith(MAGIC) else None
            is_module = elf is not None and data.find(b"PyInit_%s\0" % _module_of(entry.path)) >= 0
            mentions = _mentions(data) - {elf.soname if elf else ""}
    return replace(entry, sha256=sha256, elf=elf, is_python_module=is_module, mentions=mentions)


def _recorded(kept: IO[bytes]) -> tuple[str, ...]:
    """The first column of a RECORD; its paths have no commas but in quotes."""
    kept.seek(0)
    text = kept.read().decode(errors="replace")
    return tuple(row[0] for row in csv.reader(text.splitlines()) if row)


def _module_of(path: str) -> bytes:
    return posixpath.basename(path).partition(".")[0].encode(errors="surrogateescape")


def _mentions(data: mmap.mmap) -> frozenset[str]:
    """Names of shared libraries, also as ctypes looks for them."""
    searched = {f"lib{match.decode()}.so" for match in _FIND_LIBRARY.findall(data)}
    return frozenset({match.decode() for match in _LIBRARY.findall(data)} | searched)
