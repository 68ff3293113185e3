"""Posts webhooks over HTTP/1.1, to the very address that was checked: names are resolved once (SSRF guard).

A target that hangs costs a bounded time; only the status of its answer is read; redirects are not followed.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping, Sequence
from urllib.parse import SplitResult, urlsplit

import h11

from fanlight.errors import FailedPrecondition, FanlightError, Unavailable
from services.gateway.app.webhooks import Network, is_allowed

TIMEOUT_S = 15.0
ANSWER_LIMIT_BYTES = 16 * 1024
READ_BYTES = 4 * 1024
_PORTS = {"http": 80, "https": 443}


class WebhookHttp:
    def __init__(self, allowed: Sequence[Network], *, timeout_s: float = TIMEOUT_S) -> None:
        self._allowed = tuple(allowed)
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """The status of the answer. FailedPrecondition for an address inside; Unavailable if it does not answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post(urlsplit(url), headers, body)
        except TimeoutError as error:
            raise Unavailable(f"no answer within {self._timeout_s:g} s") from error
        except FanlightError:
            raise
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"cannot be reached: {type(error).__name__}") from error
        except h11.RemoteProtocolError as error:
            raise Unavailable("does not answer in HTTP") from error

    async def _post(self, url: SplitResult, headers: Mapping[str, str], body: bytes) -> int:
        assert url.hostname is not None
        port = url.port or _PORTS[url.scheme]
        address = await self._resolve(url.hostname, port)
        secure = {"ssl": self._tls, "server_hostname": url.hostname} if url.scheme == "https" else {}
        reader, writer = await asyncio.open_connection(address, port, **secure)  # type: ignore[arg-type]
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=ANSWER_LIMIT_BYTES)
            for event in (_request(url, headers, body), h11.Data(data=body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            return await _status(connection, reader)
        finally:
            writer.transport.abort()

    async def _resolve(self, host: str, port: int) -> str:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise Unavailable("its name cannot be resolved") from error
        addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
        for address in addresses:
            if is_allowed(address, self._allowed):
                return str(address)
        raise FailedPrecondition("points to an internal address, which this gateway does not allow")


def _request(url: SplitResult, headers: Mapping[str, str], body: bytes) -> h11.Request:
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    fixed = {
        "host": url.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "user-agent": "fanlight",
        "connection": "close",
    }
    return h11.Request(method="POST", target=target, headers=list({**fixed, **headers}.items()))


async def _status(connection: h11.Connection, reader: asyncio.StreamReader) -> int:
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event.status_code
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif not isinstance(event, h11.InformationalResponse):
            raise Unavailable("closed the connection without an answer")
