"""Posts webhooks over HTTP/1.1, to the very addresses that were checked: names are resolved once (SSRF guard).

Each address is tried. Where the environment names a proxy, the proxy resolves the name, and its rules are the guard
behind ours; networks that the operator allows are reached directly. A target that hangs costs a bounded time; of a
webhook's answer only the status is read; redirects are not followed. The hook of moderation is asked in the same way.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

import h11

from fanlight.errors import FailedPrecondition, FanlightError, Unavailable
from fanlight.proxies import BadProxy, proxy_for
from services.gateway.adapters.proxied import Stream, authorization, is_forwarding, open_stream
from services.gateway.app.webhooks import Address, Network, is_allowed
from services.kernel.network import certificate_problem, first_of, interleaved, tls_context

TIMEOUT_S = 15.0
ANSWER_LIMIT_BYTES = 16 * 1024
READ_BYTES = 4 * 1024
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    status: int
    # By names in lower case.
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class WebhookHttp:
    def __init__(self, allowed: Sequence[Network], *, timeout_s: float = TIMEOUT_S) -> None:
        self._allowed = tuple(allowed)
        self._timeout_s = timeout_s
        self._tls = tls_context()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """The status of the answer. FailedPrecondition for an address inside; Unavailable if it does not answer."""
        return (await self.ask(url, headers, body, answer_limit_bytes=0)).status

    async def ask(self, url: str, headers: Mapping[str, str], body: bytes, *, answer_limit_bytes: int) -> HttpAnswer:
        """The whole answer. As `post`; FailedPrecondition also for a longer one. With a limit of 0 no body is read."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask(urlsplit(url), headers, body, answer_limit_bytes)
        except TimeoutError as error:
            raise Unavailable(f"no answer within {self._timeout_s:g} s") from error
        except FanlightError:
            raise
        except (OSError, UnicodeError) as error:
            told = certificate_problem(error, urlsplit(url).hostname or "it")
            raise Unavailable(told or f"cannot be reached: {type(error).__name__}") from error
        except BadProxy as error:
            raise Unavailable(str(error)) from error
        except h11.RemoteProtocolError as error:
            raise Unavailable("does not answer in HTTP") from error

    async def _ask(self, url: SplitResult, headers: Mapping[str, str], body: bytes, limit_bytes: int) -> HttpAnswer:
        assert url.hostname is not None
        (reader, writer), proxy = await self._open(url, url.hostname, url.port or _PORTS[url.scheme])
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=ANSWER_LIMIT_BYTES)
            for event in (_request(url, headers, body, proxy), h11.Data(data=body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            head = await _head(connection, reader)
            found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers}
            text = await _body(connection, reader, limit_bytes) if limit_bytes else b""
            return HttpAnswer(status=head.status_code, headers=found, body=text)
        finally:
            writer.transport.abort()

    async def _open(self, url: SplitResult, host: str, port: int) -> tuple[Stream, str]:
        """The stream, and the proxy that is sent the whole address; empty where the target itself is asked."""
        proxy = proxy_for(url.geturl())
        try:
            addresses = await self._resolve(host, port)
        except Unavailable:
            # Perhaps only the proxy knows the name.
            if not proxy:
                raise
            addresses = []
        if proxy and not any(self._is_own(each) for each in addresses):
            stream = await open_stream(proxy, host, port, scheme=url.scheme, tls=self._tls)
            return stream, proxy if is_forwarding(proxy, url.scheme) else ""
        secure = {"ssl": self._tls, "server_hostname": host} if url.scheme == "https" else {}
        stream = await first_of(
            interleaved([str(each) for each in addresses]),
            lambda address: asyncio.open_connection(address, port, **secure),  # type: ignore[arg-type]
            close=_abort,
        )
        return stream, ""

    async def _resolve(self, host: str, port: int) -> list[Address]:
        """The addresses that may be called. FailedPrecondition if there are others only."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise Unavailable("its name cannot be resolved") from error
        addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
        allowed = [address for address in addresses if is_allowed(address, self._allowed)]
        if not allowed:
            raise FailedPrecondition("points to an internal address, which this gateway does not allow")
        return allowed

    def _is_own(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._allowed)


def _abort(stream: Stream) -> None:
    stream[1].transport.abort()


def _request(url: SplitResult, headers: Mapping[str, str], body: bytes, proxy: str) -> h11.Request:
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    fixed = {
        "host": url.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "user-agent": "fanlight",
        "connection": "close",
        **(authorization(proxy) if proxy else {}),
    }
    whole = f"http://{url.netloc}{target}" if proxy else target
    return h11.Request(method="POST", target=whole, headers=list({**fixed, **headers}.items()))


async def _head(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Response:
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif not isinstance(event, h11.InformationalResponse):
            raise Unavailable("closed the connection without an answer")


async def _body(connection: h11.Connection, reader: asyncio.StreamReader, limit_bytes: int) -> bytes:
    found = bytearray()
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Data):
            found += event.data
            if len(found) > limit_bytes:
                raise FailedPrecondition(f"answers with more than {limit_bytes:,} bytes")
        elif event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.EndOfMessage):
            return bytes(found)
        else:
            raise Unavailable("closed the connection in the middle of its answer")
