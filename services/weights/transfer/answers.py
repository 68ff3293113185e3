"""What an answer to a download says: which file, which version of it, which bytes, and how they are encoded.

Knows no client and no disk.
"""

import re
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from services.kernel.process import without
from services.weights.errors import NoRanges, SourceChanged, SourceFailed, Transient
from services.weights.references.manifest import ByteSpan
from services.weights.transfer.gate import HEAD_BYTES

# As in transfer/web.py.
with without("click"):
    import httpx

# A body up to this size is read to its end, so that the connection can be reused.
SHORT_BYTES = 16 * 1024
INFLATE_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes\s+(\d+)-(\d+)/(\d+|\*)", re.I)
# Versions that storages give to an object, besides ETag and Last-Modified.
_VERSIONS = ("x-goog-generation", "x-amz-version-id")
INFLATED = ("gzip", "x-gzip", "deflate")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A server's metadata of a file: `etag` only if it is a strong one; `url` is the address after all redirects.

    `validator`: what tells this version of the file from others, by the best that the server gives; empty if nothing.
    `is_guarded`: this address and its redirects may only use allowed hosts. `is_pinned`: a digest alone judges the
    bytes, so that another version is no reason to stop.
    """

    url: str
    size_bytes: int | None
    etag: str = ""
    validator: str = ""
    has_ranges: bool = True
    sha256: str = ""
    commit: str = ""
    is_guarded: bool = False
    is_pinned: bool = False
    # Of the file, as far as the caller knows it; tells what may come under it.
    name: str = ""

    def is_other_than(self, known: "RemoteFile") -> bool:
        """Whether this is another version of the file, as far as the server says."""
        sizes, digests = (self.size_bytes, known.size_bytes), (self.sha256, known.sha256)
        if all(digests):
            return digests[0] != digests[1]
        return self.validator != known.validator or (None not in sizes and sizes[0] != sizes[1])


def host_of(url: httpx.URL) -> str:
    """The host of an address, for errors and logs; the query is never shown, as it may contain a signature."""
    return url.host or "the source"


def encoding_of(response: httpx.Response) -> str:
    """How the body is compressed; empty if it is not."""
    encoding = str(response.headers.get("content-encoding", "")).strip().lower()
    return "" if encoding == "identity" else encoding


def remote_of(response: httpx.Response) -> RemoteFile:
    headers, is_plain = response.headers, not encoding_of(response)
    # 416 is the response to a range of an empty file.
    is_range = response.status_code in (206, 416)
    total = headers.get("content-range", "").rpartition("/")[2] if is_range else headers.get("content-length", "")
    etag = headers.get("etag", "")
    linked = headers.get("x-linked-etag", "").strip('"')
    return RemoteFile(
        url=str(response.url),
        # Lengths and ranges of a compressed answer are those of the compressed bytes.
        size_bytes=int(total) if is_plain and total.isdecimal() and len(total) < 20 else None,
        etag="" if etag.startswith("W/") else etag,
        validator=_validator(headers, etag),
        has_ranges=is_plain and response.status_code == 206,
        sha256=linked if len(linked) == 64 else "",
        commit=headers.get("x-repo-commit", ""),
    )


def _validator(headers: httpx.Headers, etag: str) -> str:
    """A strong ETag says it alone; a weak one and Last-Modified say it together."""
    if etag and not etag.startswith("W/"):
        return etag
    versions = [f"{name}={headers[name]}" for name in _VERSIONS if headers.get(name)]
    return " ".join([*versions, *filter(None, (etag, headers.get("last-modified", "")))])


def check_piece(response: httpx.Response, span: ByteSpan, known: RemoteFile) -> int:
    """How many bytes of the span a 206 brings from its begin; a server may bring fewer than it was asked for.

    SourceChanged if it is another version, unless the bytes are pinned; NoRanges; SourceFailed.
    """
    now, host = remote_of(response), host_of(response.url)
    if response.status_code == 416:
        kind = Transient if known.is_pinned else SourceChanged
        raise kind(f"{host} has a shorter file than before")
    if response.status_code != 206:
        _refuse_whole(now, known, host)
    if encoding_of(response):
        raise NoRanges(f"{host} compresses ranges")
    if not known.is_pinned and now.is_other_than(known):
        raise SourceChanged(f"{host} has a different file than before")
    found = _RANGE.fullmatch(response.headers.get("content-range", "").strip())
    if found is None or int(found[1]) != span.begin or not span.begin < int(found[2]) + 1 <= span.end:
        # Several parts in one answer, or all of the file under the status of a range.
        raise NoRanges(f"{host} sends other bytes than the requested range")
    count = int(found[2]) + 1 - span.begin
    is_other_file = now.size_bytes is not None and now.size_bytes != known.size_bytes
    if response.headers.get("content-length", str(count)) != str(count) or is_other_file:
        raise SourceFailed(f"{host} sends other bytes than the requested range")
    return count


def _refuse_whole(now: RemoteFile, known: RemoteFile, host: str) -> None:
    """All of a file came where a range was requested."""
    if not known.is_pinned and now.is_other_than(known):
        raise SourceChanged(f"{host} has a different file than before")
    if now.size_bytes not in (None, known.size_bytes):
        raise SourceFailed(f"{host} has {now.size_bytes} bytes instead of {known.size_bytes}")
    raise NoRanges(f"{host} does not support ranges")


async def blocks_of(response: httpx.Response) -> AsyncIterator[bytes]:
    """The body, decompressed where a proxy compressed it though identity was requested.

    SourceFailed for a compression that this client does not know; Transient if it is cut off.
    """
    encoding, host = encoding_of(response), host_of(response.url)
    if not encoding:
        async for block in response.aiter_raw():
            yield block
        return
    if encoding not in INFLATED:
        raise SourceFailed(f"{host} compresses its answer with {encoding[:20]}, although identity was requested")
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        async for block in response.aiter_raw():
            for data in _inflated(inflate, block):
                yield data
    except zlib.error as error:
        raise SourceFailed(f"{host} says {encoding} of an answer that is not compressed like that") from error
    if not inflate.eof:
        raise Transient(f"{host} ended its compressed answer too early")


def _inflated(inflate: "zlib._Decompress", block: bytes) -> Iterator[bytes]:
    """In steps, so that a block of zeros does not fill the memory."""
    while True:
        data = inflate.decompress(block, INFLATE_BYTES)
        if data:
            yield data
        block = inflate.unconsumed_tail
        if inflate.eof or (not block and len(data) < INFLATE_BYTES):
            return


async def exactly(blocks: AsyncIterator[bytes], count: int, *, host: str, is_pinned: bool) -> AsyncIterator[bytes]:
    """The blocks of a body that has `count` bytes; Transient if it ends early, SourceFailed if it goes on.

    Reads to the end of the body: only then the connection can be reused. Where a digest judges the bytes, what comes
    beyond them is left.
    """
    left = count
    async for block in blocks:
        yield block[:left]
        left -= len(block)
        if left < 0 and is_pinned:
            return
        if left < 0:
            raise SourceFailed(f"{host} sends more than {count} bytes")
    if left:
        raise Transient(f"{host} ended {left} bytes too early")


async def look(response: httpx.Response) -> tuple[bytes, AsyncIterator[bytes]]:
    """The first HEAD_BYTES of the body, fewer if it has fewer, and all its blocks, with these in front."""
    blocks, head = blocks_of(response), bytearray()
    async for block in blocks:
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return bytes(head[:HEAD_BYTES]), _joined(bytes(head), blocks)


async def _joined(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if head:
        yield head
    async for block in rest:
        yield block


async def finish(response: httpx.Response) -> None:
    """Read a short body to its end, so that the connection can be reused; close a long one."""
    length = response.headers.get("content-length", "")
    if length.isdigit() and int(length) <= SHORT_BYTES:
        async for _ in response.aiter_raw():
            pass
    else:
        await response.aclose()


async def read(response: httpx.Response, limit_bytes: int) -> bytes:
    body = bytearray()
    async for block in blocks_of(response):
        body += block
        if len(body) > limit_bytes:
            raise SourceFailed(f"{host_of(response.url)} sends more than {limit_bytes} bytes")
    return bytes(body)
