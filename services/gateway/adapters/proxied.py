"""Opens a stream through an HTTP or SOCKS5 proxy. The proxy resolves the name; what it answers is bounded."""

import asyncio
import base64
import ssl
from urllib.parse import SplitResult, unquote, urlsplit

import h11

from fanlight.errors import Unavailable
from fanlight.proxies import HTTP_SCHEMES, shown

ANSWER_LIMIT_BYTES = 16 * 1024
READ_BYTES = 4 * 1024
_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def is_forwarding(proxy: str, scheme: str) -> bool:
    """Whether the proxy is sent the request itself, with the whole address in it, instead of a tunnel."""
    return scheme == "http" and proxy.split(":", 1)[0] in HTTP_SCHEMES


def authorization(proxy: str) -> dict[str, str]:
    """The header that the proxy's user and password become."""
    user, password = _login(urlsplit(proxy))
    if not user:
        return {}
    return {"proxy-authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


async def open_stream(proxy: str, host: str, port: int, *, scheme: str, tls: ssl.SSLContext) -> Stream:
    """A stream to the host, with TLS for https; to the proxy itself where it forwards. Unavailable, OSError."""
    place = urlsplit(proxy)
    secure = {"ssl": tls, "server_hostname": place.hostname} if place.scheme == "https" else {}
    try:
        reader, writer = await asyncio.open_connection(
            place.hostname,
            place.port or _PORTS[place.scheme],
            **secure,  # type: ignore[arg-type]
        )
    except OSError as error:
        raise Unavailable(f"the proxy {shown(proxy)} cannot be reached") from error
    try:
        if place.scheme not in HTTP_SCHEMES:
            await _socks(reader, writer, proxy, host, port)
        elif not is_forwarding(proxy, scheme):
            await _tunnel(reader, writer, proxy, host, port)
        if scheme == "https":
            await writer.start_tls(tls, server_hostname=host)
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


async def _tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, proxy: str, host: str, port: int) -> None:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=ANSWER_LIMIT_BYTES)
    headers = {"host": target, "user-agent": "fanlight", **authorization(proxy)}
    writer.write(connection.send(h11.Request(method="CONNECT", target=target, headers=list(headers.items()))) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            if 200 <= event.status_code < 300:
                return
            raise Unavailable(f"the proxy {shown(proxy)} answers {event.status_code}")
        elif not isinstance(event, h11.InformationalResponse):
            raise Unavailable(f"the proxy {shown(proxy)} closed the connection without an answer")


async def _socks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, proxy: str, host: str, port: int) -> None:
    try:
        from socksio import exceptions, socks5
    except ImportError as error:
        raise Unavailable(f"the proxy {shown(proxy)} speaks SOCKS, which needs socksio: pip install socksio") from error
    user, password = _login(urlsplit(proxy))
    method = socks5.SOCKS5AuthMethod.USERNAME_PASSWORD if user else socks5.SOCKS5AuthMethod.NO_AUTH_REQUIRED
    connection = socks5.SOCKS5Connection()

    async def ask(request: object) -> object:
        connection.send(request)
        writer.write(connection.data_to_send())
        await writer.drain()
        return connection.receive_data(await reader.read(READ_BYTES))

    try:
        chosen = await ask(socks5.SOCKS5AuthMethodsRequest([method]))
        if getattr(chosen, "method", None) != method:
            raise Unavailable(f"the proxy {shown(proxy)} wants {'another login' if user else 'a user and a password'}")
        if user:
            login = await ask(socks5.SOCKS5UsernamePasswordRequest(user.encode(), password.encode()))
            if not getattr(login, "success", False):
                raise Unavailable(f"the proxy {shown(proxy)} rejects its user and password")
        reply = await ask(socks5.SOCKS5CommandRequest.from_address(socks5.SOCKS5Command.CONNECT, (host, port)))
    except (exceptions.ProtocolError, ValueError) as error:
        raise Unavailable(f"the proxy {shown(proxy)} does not answer in SOCKS5") from error
    if getattr(reply, "reply_code", None) != socks5.SOCKS5ReplyCode.SUCCEEDED:
        raise Unavailable(f"the proxy {shown(proxy)} does not connect: {getattr(reply, 'reply_code', 'no answer')}")


def _login(place: SplitResult) -> tuple[str, str]:
    return unquote(place.username or ""), unquote(place.password or "")
