"""HTTP client for weights: follows redirects, sends tokens to their own origin only, translates responses to errors."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from socket import SO_RCVBUF, SOL_SOCKET

from fanlight.errors import FanlightError
from services.kernel.process import without
from services.weights.errors import (
    NoRanges,
    NotAllowed,
    ServerBusy,
    SourceChanged,
    SourceFailed,
    Transient,
)
from services.weights.references.manifest import ByteSpan
from services.weights.transfer.connecting import ProxyTransport
from services.weights.transfer.refusals import REFUSED, refusal_of

# httpx with click also imports its own command line, and rich and pygments for that.
with without("click"):
    import httpx

# A body up to this size is read to its end, so that the connection can be reused.
SHORT_BYTES = 16 * 1024
MAX_REDIRECTS = 6
MAX_PROBED = 256
MAX_JSON_BYTES = 64 * 1024 * 1024
# Bytes in a socket's buffer are lost when the process is killed.
RECEIVE_BUFFER_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 10.0
USER_AGENT = "fanlight"
_BUSY = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A server's metadata of a file: `etag` only if it is a strong one; `url` is the address after all redirects.

    `is_guarded`: this address and its redirects may only use allowed hosts.
    """

    url: str
    size_bytes: int | None
    etag: str = ""
    has_ranges: bool = True
    sha256: str = ""
    commit: str = ""
    is_guarded: bool = False


def check_piece(response: httpx.Response, span: ByteSpan, known: RemoteFile) -> None:
    now, host = remote_of(response), host_of(response.url)
    if response.status_code == 416 or (known.etag and now.etag and now.etag != known.etag):
        raise SourceChanged(f"{host} has a different file than before")
    if response.status_code == 200:
        same = now.etag == known.etag and now.size_bytes == known.size_bytes
        raise (
            NoRanges(f"{host} does not support ranges")
            if same
            else SourceChanged(f"{host} has a different file than before")
        )
    begin = response.headers.get("content-range", "").removeprefix("bytes").strip().split("-")[0]
    length = response.headers.get("content-length", str(len(span)))
    is_whole = begin == str(span.begin) and length == str(len(span))
    if response.status_code != 206 or not is_whole or now.size_bytes != known.size_bytes:
        raise SourceFailed(f"{host} sends other bytes than the requested range")


def remote_of(response: httpx.Response) -> RemoteFile:
    headers = response.headers
    # 416 is the response to a range of an empty file.
    is_range = response.status_code in (206, 416)
    total = headers.get("content-range", "").rpartition("/")[2] if is_range else headers.get("content-length", "")
    etag = headers.get("etag", "")
    linked = headers.get("x-linked-etag", "").strip('"')
    return RemoteFile(
        url=str(response.url),
        size_bytes=int(total) if total.isdigit() else None,
        etag="" if etag.startswith("W/") else etag,
        has_ranges=is_range,
        sha256=linked if len(linked) == 64 else "",
        commit=headers.get("x-repo-commit", ""),
    )


async def exactly(response: httpx.Response, count: int | None) -> AsyncIterator[bytes]:
    """The body up to `count` bytes; Transient if it ends early.

    Reads to the end of the body if it ends there: only then the connection can be reused.
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
    """Read a short body to its end, so that the connection can be reused; close a long one."""
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
    """The host of an address, for errors and logs; the query is never shown, as it may contain a signature."""
    return url.host or "the source"


class Web:
    """`tokens` by endpoint, such as `https://hub.example`; sent only to the same scheme, host and port."""

    def __init__(
        self,
        tokens: Mapping[str, str],
        *,
        stall_s: float,
        connections: int,
        wall_s: Callable[[], float],
        allows: Callable[[str], bool] = lambda host: True,
    ) -> None:
        self._tokens = {_origin(httpx.URL(endpoint)): token for endpoint, token in tokens.items()}
        self._wall_s = wall_s
        self._stall_s = stall_s
        self._limits = httpx.Limits(max_connections=4 * connections, max_keepalive_connections=2 * connections)
        self._opened: httpx.AsyncClient | None = None
        # Results of probes that no download has used yet.
        self._probed: dict[str, RemoteFile] = {}
        self._allows = allows
        # Addresses that a request named.
        self._guarded: set[str] = set()

    def guard(self, url: str) -> None:
        """Restrict this address and its redirects to allowed hosts."""
        self._guarded.add(str(httpx.URL(url)))

    def _is_guarded(self, url: str) -> bool:
        return str(httpx.URL(url)) in self._guarded

    @property
    def _client(self) -> httpx.AsyncClient:
        """Created on first use: a plan from the catalog needs no client."""
        if self._opened is None:
            self._opened = httpx.AsyncClient(
                timeout=httpx.Timeout(self._stall_s, connect=CONNECT_TIMEOUT_S, pool=None),
                transport=ProxyTransport(self._limits, [(SOL_SOCKET, SO_RCVBUF, RECEIVE_BUFFER_BYTES)]),
                headers={"user-agent": USER_AGENT, "accept-encoding": "identity"},
            )
        return self._opened

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.aclose()

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, headers: Mapping[str, str] | None = None, *, is_guarded: bool = False
    ) -> AsyncIterator[httpx.Response]:
        """The response after all redirects, its body not read yet. Transient if the network fails."""
        async with contextlib.AsyncExitStack() as stack:
            with _network_errors(url):
                is_guarded = is_guarded or self._is_guarded(url)
                response = await self._follow(stack, httpx.URL(url), dict(headers or {}), is_guarded=is_guarded)
                await self._refuse(response)
                yield response

    async def _follow(
        self, stack: contextlib.AsyncExitStack, url: httpx.URL, headers: dict[str, str], *, is_guarded: bool
    ) -> httpx.Response:
        linked: dict[str, str] = {}
        for _ in range(MAX_REDIRECTS):
            if is_guarded and not self._allows(url.host):
                raise NotAllowed(f"{url.host} is not in FANLIGHT_WEIGHTS_URL_HOSTS", field="reference")
            token = self._tokens.get(_origin(url))
            sent = {**headers, "authorization": f"Bearer {token}"} if token else headers
            response = await stack.enter_async_context(self._client.stream("GET", url, headers=sent))
            linked.update({k: v for k, v in response.headers.items() if k.startswith(("x-linked", "x-repo"))})
            if not response.has_redirect_location:
                response.headers.update(linked)
                return response
            await finish(response)
            url = _next(url, response.headers["location"])
        raise SourceFailed(f"{host_of(url)} redirects more than {MAX_REDIRECTS} times")

    async def _refuse(self, response: httpx.Response) -> None:
        status, host = response.status_code, host_of(response.url)
        if status < 400 or status == 416:
            return
        if status in REFUSED:
            raise await refusal_of(response, has_token="authorization" in response.request.headers)
        if status in _BUSY or status >= 500 or status == 408:
            raise ServerBusy(f"{host} answers {status}", retry_after_s=self._retry_after_s(response))
        raise SourceFailed(f"{host} answers {status}")

    def _retry_after_s(self, response: httpx.Response) -> float | None:
        text = response.headers.get("retry-after", "")
        if text.isdigit():
            return float(text)
        with contextlib.suppress(ValueError):
            return max(0.0, parsedate_to_datetime(text).timestamp() - self._wall_s())
        return None

    async def json(self, url: str) -> tuple[object, httpx.Headers]:
        async with self.open(url, {"accept": "application/json"}) as response:
            body = await read(response, MAX_JSON_BYTES)
            try:
                return httpx.Response(200, content=body).json(), response.headers
            except ValueError as error:
                raise SourceFailed(f"{host_of(response.url)} answers with something that is not JSON") from error

    async def body(self, url: str, *, limit_bytes: int) -> tuple[bytes, RemoteFile]:
        """The whole body; SourceFailed if it is larger than `limit_bytes`."""
        async with self.open(url) as response:
            return await read(response, limit_bytes), remote_of(response)

    async def probe(self, url: str) -> RemoteFile:
        """The file's metadata, from a request for its first byte."""
        async with self.open(url, {"range": "bytes=0-0"}) as response:
            await finish(response)
            return replace(remote_of(response), is_guarded=self._is_guarded(url))

    async def probe_ahead(self, url: str) -> RemoteFile:
        """As `probe`, and keep the result for the download that probably follows."""
        if len(self._probed) >= MAX_PROBED:
            self._probed.clear()
        self._probed[url] = await self.probe(url)
        return self._probed[url]

    async def probed(self, url: str) -> RemoteFile:
        """The result of `probe_ahead`, once; else a new probe."""
        return self._probed.pop(url, None) or await self.probe(url)

    @contextlib.asynccontextmanager
    async def piece(self, url: str, span: ByteSpan, known: RemoteFile) -> AsyncIterator[AsyncIterator[bytes]]:
        """Exactly the bytes of the span, if the file is unchanged. NoRanges, SourceChanged."""
        headers = {"range": f"bytes={span.begin}-{span.end - 1}"}
        if known.etag:
            headers["if-range"] = known.etag
        async with self.open(url, headers, is_guarded=known.is_guarded) as response:
            check_piece(response, span, known)
            yield exactly(response, len(span))

    @contextlib.asynccontextmanager
    async def stream(self, url: str, known: RemoteFile) -> AsyncIterator[AsyncIterator[bytes]]:
        """All bytes from the start, for servers without ranges."""
        async with self.open(url) as response:
            now = remote_of(response)
            if now.etag != known.etag or now.size_bytes != known.size_bytes:
                raise SourceChanged(f"{host_of(response.url)} has a different file than before")
            yield exactly(response, known.size_bytes)


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except FanlightError:
        raise
    except httpx.TimeoutException as error:
        raise Transient(f"{host_of(httpx.URL(url))} timed out: no data") from error
    except (httpx.TransportError, httpx.StreamError) as error:
        raise Transient(f"{host_of(httpx.URL(url))}: the connection broke") from error
    except httpx.InvalidURL as error:
        raise SourceFailed(f"not a valid address: {error}") from error


def _next(url: httpx.URL, location: str) -> httpx.URL:
    try:
        target = url.join(location)
    except httpx.InvalidURL as error:
        raise SourceFailed(f"{host_of(url)} redirects to an invalid address") from error
    if target.scheme not in ("http", "https") or (url.scheme == "https" and target.scheme != "https"):
        raise SourceFailed(f"{host_of(url)} redirects to {target.scheme or 'nowhere'}")
    return target.copy_with(username=None, password=None) if target.userinfo else target


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
