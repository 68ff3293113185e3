"""What a server answers: read as far as it says something, and our errors where it is not what was asked for.

Asks nothing itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.weights.errors import NoRanges, SourceChanged, SourceFailed, Transient

if TYPE_CHECKING:
    import httpx

    from services.weights.chunks import Span

# A body that is read to its end rather than that its connection is given up.
SHORT_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What a server said of a file: `etag` only where it promises equal bytes; `url` is behind all redirects.

    `is_guarded`: neither this address nor what it leads to may be just any host.
    """

    url: str
    size_bytes: int | None
    etag: str = ""
    has_ranges: bool = True
    sha256: str = ""
    commit: str = ""
    is_guarded: bool = False


def check_piece(response: httpx.Response, span: Span, known: Remote) -> None:
    now, host = remote_of(response), host_of(response.url)
    if response.status_code == 416 or (known.etag and now.etag and now.etag != known.etag):
        raise SourceChanged(f"{host} has another file than before")
    if response.status_code == 200:
        same = now.etag == known.etag and now.size_bytes == known.size_bytes
        raise NoRanges(f"{host} sends no ranges") if same else SourceChanged(f"{host} has another file than before")
    begin = response.headers.get("content-range", "").removeprefix("bytes").strip().split("-")[0]
    length = response.headers.get("content-length", str(len(span)))
    is_whole = begin == str(span.begin) and length == str(len(span))
    if response.status_code != 206 or not is_whole or now.size_bytes != known.size_bytes:
        raise SourceFailed(f"{host} answers a range with other bytes than were asked for")


def remote_of(response: httpx.Response) -> Remote:
    headers = response.headers
    # 416 answers a question about the first byte of an empty file.
    is_range = response.status_code in (206, 416)
    total = headers.get("content-range", "").rpartition("/")[2] if is_range else headers.get("content-length", "")
    etag = headers.get("etag", "")
    linked = headers.get("x-linked-etag", "").strip('"')
    return Remote(
        url=str(response.url),
        size_bytes=int(total) if total.isdigit() else None,
        etag="" if etag.startswith("W/") else etag,
        has_ranges=is_range,
        sha256=linked if len(linked) == 64 else "",
        commit=headers.get("x-repo-commit", ""),
    )


async def exactly(response: httpx.Response, count: int | None) -> AsyncIterator[bytes]:
    """The body up to `count` bytes; Transient when it ends before.

    Read to its end where it ends there, for only then the connection serves the next request.
    """
    is_all = response.headers.get("content-length") == str(count)
    async for block in response.aiter_raw():
        if count is None:
            yield block
            continue
        yield block[:count]
        count -= len(block)
        if count <= 0 and not is_all:
            return
    if count:
        raise Transient(f"{host_of(response.url)} ended {count} bytes too early")


async def finish(response: httpx.Response) -> None:
    """Read a short body to its end, so that the connection can be used again; a long one is let go."""
    length = response.headers.get("content-length", "")
    if length.isdigit() and int(length) <= SHORT_BYTES:
        async for _ in response.aiter_raw():
            pass
    else:
        await response.aclose()


async def read(response: httpx.Response, limit_bytes: int) -> bytes:
    body = bytearray()
    async for block in response.aiter_raw():
        body += block
        if len(body) > limit_bytes:
            raise SourceFailed(f"{host_of(response.url)} sends more than {limit_bytes} bytes")
    return bytes(body)


def host_of(url: httpx.URL) -> str:
    """What may be shown and logged of an address: never its query, which can hold a signature."""
    return url.host or "the source"
