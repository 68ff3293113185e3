"""HTTP client for weights: follows redirects, sends tokens to their own origin only, translates responses to errors."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from socket import SO_RCVBUF, SOL_SOCKET
from urllib.parse import unquote, urlsplit

from fanlight.errors import FanlightError
from services.kernel.process import without
from services.weights.errors import (
    ForeignAnswer,
    NoRanges,
    NotAllowed,
    RequestRefused,
    ServerBusy,
    SourceChanged,
    SourceFailed,
    Transient,
    blame_source,
)
from services.weights.references.manifest import ByteSpan
from services.weights.transfer.answers import (
    RemoteFile,
    blocks_of,
    check_piece,
    exactly,
    finish,
    host_of,
    look,
    read,
    remote_of,
)
from services.weights.transfer.connecting import ProxyTransport
from services.weights.transfer.gate import HEAD_BYTES, page_in, refuse_foreign
from services.weights.transfer.rate_limits import is_exhausted, wait_s
from services.weights.transfer.refusals import REFUSED, refusal_of, said_by

# httpx with click also imports its own command line, and rich and pygments for that.
with without("click"):
    import httpx

MAX_REDIRECTS = 6
MAX_PROBED = 256
MAX_JSON_BYTES = 64 * 1024 * 1024
# Bytes in a socket's buffer are lost when the process is killed.
RECEIVE_BUFFER_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 10.0
USER_AGENT = "fanlight"
# Every other status is an error; 416 is the answer to a range of an empty file.
ANSWERS = (200, 206, 416)
_BUSY = (408, 425, 429)
_LOGIN_TO_NETWORK = 511
# How servers refuse a range that they could answer without.
_RANGE_REFUSED = (400, 405, 501)


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
        """Raise the error for any status that is no answer."""
        status, host, headers = response.status_code, host_of(response.url), response.headers
        if status in ANSWERS:
            return
        is_throttled = status in (401, 403) and is_exhausted(headers)
        if status in _BUSY or (status >= 500 and status not in _RANGE_REFUSED) or is_throttled:
            todo = ": log in to this network first" if status == _LOGIN_TO_NETWORK else ""
            raise ServerBusy(f"{host} answers {status}{todo}", retry_after_s=wait_s(headers, self._wall_s()))
        if status in REFUSED:
            raise await refusal_of(response, has_token="authorization" in response.request.headers)
        said = await said_by(response)
        told = f" ({said.told})" if said.told else ""
        if said.region:
            told += f": the bucket is in the region {said.region}; set FANLIGHT_WEIGHTS_S3_REGION={said.region}"
        elif status < 400:
            told += " in place of the file: check the address"
        kind = RequestRefused if status in _RANGE_REFUSED else SourceFailed
        raise kind(f"{host} answers {status}{told}")

    async def json(self, url: str) -> tuple[object, httpx.Headers]:
        async with self.open(url, {"accept": "application/json"}) as response:
            body = await read(response, MAX_JSON_BYTES)
            try:
                return httpx.Response(200, content=body).json(), response.headers
            except ValueError as error:
                host = host_of(response.url)
                if page_in(body[:HEAD_BYTES]):
                    todo = "does one have to log in to this network first?"
                    raise ForeignAnswer(f"{host} answers with a web page instead of JSON: {todo}") from error
                raise SourceFailed(f"{host} answers with something that is not JSON") from error

    async def body(self, url: str, *, limit_bytes: int) -> tuple[bytes, RemoteFile]:
        """The whole body; SourceFailed if it is larger than `limit_bytes`."""
        async with self.open(url) as response:
            return await read(response, limit_bytes), remote_of(response)

    async def probe(self, url: str, *, name: str = "", is_pinned: bool = False) -> RemoteFile:
        """The file's metadata, from a request for its first byte. ForeignAnswer if it is no file `name`.

        `is_pinned`: a digest will judge the bytes; only a web page is refused.
        """
        try:
            return await self._probe(url, {"range": "bytes=0-0"}, name=name, is_pinned=is_pinned)
        except RequestRefused:
            return await self._probe(url, {}, name=name, is_pinned=is_pinned)

    async def _probe(self, url: str, headers: Mapping[str, str], *, name: str, is_pinned: bool) -> RemoteFile:
        async with self.open(url, headers) as response:
            remote = replace(
                remote_of(response), is_guarded=self._is_guarded(url), is_pinned=is_pinned, name=name or _name_of(url)
            )
            if response.status_code == 200:
                head, _ = await look(response)
                if not is_pinned or page_in(head):
                    refuse_foreign(head, remote.size_bytes, name=remote.name, url=url)
            else:
                await finish(response)
            return remote

    async def probe_ahead(self, url: str) -> RemoteFile:
        """As `probe`, and keep the result for the download that probably follows."""
        if len(self._probed) >= MAX_PROBED:
            self._probed.clear()
        self._probed[url] = await self.probe(url)
        return self._probed[url]

    async def probed(self, url: str, *, name: str = "", is_pinned: bool = False) -> RemoteFile:
        """The result of `probe_ahead`, once; else a new probe."""
        ahead = self._probed.pop(url, None)
        if ahead is None:
            return await self.probe(url, name=name, is_pinned=is_pinned)
        return replace(ahead, name=name or ahead.name, is_pinned=is_pinned)

    @contextlib.asynccontextmanager
    async def piece(self, url: str, span: ByteSpan, known: RemoteFile) -> AsyncIterator[AsyncIterator[bytes]]:
        """Bytes of the span from its begin, if the file is unchanged; perhaps not all of them. NoRanges, SourceChanged.

        Versions are compared here rather than by `If-Range`, which some servers answer with the whole file.
        """
        headers = {"range": f"bytes={span.begin}-{span.end - 1}"}
        async with self.open(url, headers, is_guarded=known.is_guarded) as response:
            if response.status_code == 200:
                await self._checked(response, known)
            count = check_piece(response, span, known)
            host = host_of(response.url)
            yield exactly(blocks_of(response), count, host=host, is_pinned=known.is_pinned)

    @contextlib.asynccontextmanager
    async def stream(self, url: str, known: RemoteFile, begin: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """All bytes from `begin`, in one answer; of a length that is checked where it is known. NoRanges."""
        headers = {"range": f"bytes={begin}-"} if begin else {}
        async with self.open(url, headers, is_guarded=known.is_guarded) as response:
            if begin and response.status_code == 416:
                # The file ends where we are.
                yield blocks_of(response)
                return
            blocks = await self._checked(response, known)
            if not known.is_pinned and known.validator and remote_of(response).is_other_than(known):
                raise SourceChanged(f"{host_of(response.url)} has a different file than before")
            if begin and (response.status_code != 206 or not _begins_at(response, begin)):
                raise NoRanges(f"{host_of(response.url)} does not support ranges")
            host = host_of(response.url)
            if known.size_bytes is None:
                yield blocks
            else:
                yield exactly(blocks, known.size_bytes - begin, host=host, is_pinned=known.is_pinned)

    async def _checked(self, response: httpx.Response, known: RemoteFile) -> AsyncIterator[bytes]:
        """The blocks of an answer in the middle of a download. A page there is trouble of the link: Transient."""
        head, blocks = await look(response)
        size_bytes = remote_of(response).size_bytes
        is_likely = size_bytes == known.size_bytes if size_bytes is not None else not page_in(head)
        try:
            if not (known.is_pinned and is_likely):
                refuse_foreign(head, size_bytes, name=known.name, url=str(response.url))
        except ForeignAnswer as error:
            raise Transient(error.message) from error
        return blocks


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Our errors for the client's, with the host as the part that failed where it is at fault."""
    try:
        with _our_errors(url):
            yield
    except FanlightError as error:
        blame_source(error, _host(url))
        raise


@contextlib.contextmanager
def _our_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise Transient(f"{_host(url)} timed out: no data") from error
    except (httpx.TransportError, httpx.StreamError) as error:
        raise Transient(f"{_host(url)}: the connection broke") from error
    except httpx.InvalidURL as error:
        raise SourceFailed(f"not a valid address: {error}") from error


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the source"


def _begins_at(response: httpx.Response, begin: int) -> bool:
    content_range = str(response.headers.get("content-range", ""))
    return content_range.removeprefix("bytes").strip().startswith(f"{begin}-")


def _name_of(url: str) -> str:
    """The file's name by its address."""
    return unquote(httpx.URL(url).path.rsplit("/", 1)[-1])


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
