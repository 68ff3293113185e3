"""HTTP for weights: redirects by hand, tokens for their own origin only, answers turned into our errors."""

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from functools import cache
from socket import SO_RCVBUF, SOL_SOCKET

from fanlight.errors import FanlightError, NotFound
from services.kernel.without import without
from services.weights.answers import Remote, check_piece, exactly, finish, host_of, read, remote_of
from services.weights.chunks import Span
from services.weights.errors import (
    NotAllowed,
    Refused,
    SourceChanged,
    SourceFailed,
    TokenRefused,
    Transient,
    Unreachable,
)

# With click it takes its own command line along, and rich and pygments for that.
with without("click"):
    import httpx

MAX_REDIRECTS = 6
MAX_PROBED = 256
MAX_JSON_BYTES = 64 * 1024 * 1024
# What lies in a socket's buffer is lost when the process is killed.
RECEIVE_BUFFER_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 10.0
USER_AGENT = "fanlight"

_BUSY = (429, 503)
_GONE = (404, 410, 451)


class Web:
    """`tokens` by endpoint, such as `https://hub.example`; used where scheme, host and port are the same."""

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
        # What probes were told that nobody has used yet.
        self._probed: dict[str, Remote] = {}
        self._allows = allows
        # Addresses that somebody named himself.
        self._guarded: set[str] = set()

    def guard(self, url: str) -> None:
        """From now on this address is followed to hosts that are allowed only."""
        self._guarded.add(str(httpx.URL(url)))

    def _is_guarded(self, url: str) -> bool:
        return str(httpx.URL(url)) in self._guarded

    @property
    def _client(self) -> httpx.AsyncClient:
        """Made on first use: a plan out of the catalog needs none."""
        if self._opened is None:
            self._opened = httpx.AsyncClient(
                timeout=httpx.Timeout(self._stall_s, connect=CONNECT_TIMEOUT_S, pool=None),
                transport=httpx.AsyncHTTPTransport(
                    verify=_tls(),
                    limits=self._limits,
                    socket_options=[(SOL_SOCKET, SO_RCVBUF, RECEIVE_BUFFER_BYTES)],
                ),
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
        """The answer behind all redirects, its body not yet read. Transient when the network fails."""
        async with contextlib.AsyncExitStack() as stack:
            with _network_errors(url):
                is_guarded = is_guarded or self._is_guarded(url)
                response = await self._follow(stack, httpx.URL(url), dict(headers or {}), is_guarded=is_guarded)
                self._refuse(response)
                yield response

    async def _follow(
        self, stack: contextlib.AsyncExitStack, url: httpx.URL, headers: dict[str, str], *, is_guarded: bool
    ) -> httpx.Response:
        linked: dict[str, str] = {}
        for _ in range(MAX_REDIRECTS):
            if is_guarded and not self._allows(url.host):
                raise NotAllowed(f"{url.host} is none of FANLIGHT_WEIGHTS_URL_HOSTS", field="reference")
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

    def _refuse(self, response: httpx.Response) -> None:
        status, host = response.status_code, host_of(response.url)
        if status < 400 or status == 416:
            return
        if status in (401, 403):
            raise TokenRefused(f"{host} answers {status}: it wants a token, or refuses the one that is set")
        if status in _GONE:
            raise NotFound(f"{host} has it not ({status})")
        if status in _BUSY or status >= 500 or status == 408:
            raise Refused(f"{host} answers {status}", retry_after_s=self._retry_after_s(response))
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
                raise SourceFailed(f"{host_of(response.url)} answers something that is no JSON") from error

    async def body(self, url: str, *, limit_bytes: int) -> tuple[bytes, Remote]:
        """The whole body, at most so many bytes."""
        async with self.open(url) as response:
            return await read(response, limit_bytes), remote_of(response)

    async def probe(self, url: str) -> Remote:
        """What the server says of the file, by asking for its first byte."""
        async with self.open(url, {"range": "bytes=0-0"}) as response:
            await finish(response)
            return replace(remote_of(response), is_guarded=self._is_guarded(url))

    async def probe_ahead(self, url: str) -> Remote:
        """As `probe`, for a download that is likely to follow: it need not ask again."""
        if len(self._probed) >= MAX_PROBED:
            self._probed.clear()
        self._probed[url] = await self.probe(url)
        return self._probed[url]

    async def probed(self, url: str) -> Remote:
        """What was told ahead, once; else what the server says now."""
        return self._probed.pop(url, None) or await self.probe(url)

    @contextlib.asynccontextmanager
    async def piece(self, url: str, span: Span, known: Remote) -> AsyncIterator[AsyncIterator[bytes]]:
        """Exactly the bytes of the span, if the file is still the one that is known; NoRanges, SourceChanged."""
        headers = {"range": f"bytes={span.begin}-{span.end - 1}"}
        if known.etag:
            headers["if-range"] = known.etag
        async with self.open(url, headers, is_guarded=known.is_guarded) as response:
            check_piece(response, span, known)
            yield exactly(response, len(span))

    @contextlib.asynccontextmanager
    async def stream(self, url: str, known: Remote) -> AsyncIterator[AsyncIterator[bytes]]:
        """All bytes from the first, for servers without ranges."""
        async with self.open(url) as response:
            now = remote_of(response)
            if now.etag != known.etag or now.size_bytes != known.size_bytes:
                raise SourceChanged(f"{host_of(response.url)} has another file than before")
            yield exactly(response, known.size_bytes)


@cache
def _tls() -> ssl.SSLContext:
    """Reading the roots takes long enough to do it once."""
    return httpx.create_ssl_context()


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except FanlightError:
        raise
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"{host_of(httpx.URL(url))} cannot be reached") from error
    except httpx.TimeoutException as error:
        raise Transient(f"{host_of(httpx.URL(url))} has gone silent") from error
    except (httpx.TransportError, httpx.StreamError) as error:
        raise Transient(f"{host_of(httpx.URL(url))}: the connection broke") from error
    except httpx.InvalidURL as error:
        raise SourceFailed(f"no address: {error}") from error


def _next(url: httpx.URL, location: str) -> httpx.URL:
    try:
        target = url.join(location)
    except httpx.InvalidURL as error:
        raise SourceFailed(f"{host_of(url)} redirects to no address") from error
    if target.scheme not in ("http", "https") or (url.scheme == "https" and target.scheme != "https"):
        raise SourceFailed(f"{host_of(url)} redirects to {target.scheme or 'nowhere'}")
    return target.copy_with(username=None, password=None) if target.userinfo else target


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
