"""Bytes past the gateway, to and from addresses that it gave for them. Knows no storage and holds no credentials."""

import asyncio
import http.client
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, urlsplit

from fanlight.errors import NodeFault

CONNECT_S = 10.0
# Between two signs of life; a slow link may take long for the whole.
SILENCE_S = 60.0
READ_BYTES = 256 * 1024
# The storage has the bytes already: somebody else sent the same.
_PRESENT = 412


async def put(url: str, headers: Mapping[str, str], data: bytes) -> None:
    """NodeFault when the bytes are not there afterwards."""
    await asyncio.to_thread(_put, urlsplit(url), headers, data)


async def get(url: str, take: Callable[[bytes], None]) -> None:
    """All bytes, as they come, to `take`, which is called on another thread. NodeFault when it breaks off."""
    await asyncio.to_thread(_get, urlsplit(url), take)


def _put(url: SplitResult, headers: Mapping[str, str], data: bytes) -> None:
    connection = _connection(url)
    try:
        _connect(connection)
        connection.request("PUT", _target(url), data, dict(headers))
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise NodeFault(f"the upload broke: {type(error).__name__}") from error
    finally:
        connection.close()
    if not 200 <= status < 300 and status != _PRESENT:
        raise NodeFault(f"the upload was refused with {status}")


def _get(url: SplitResult, take: Callable[[bytes], None]) -> None:
    connection = _connection(url)
    try:
        _connect(connection)
        connection.request("GET", _target(url))
        answer = connection.getresponse()
        if answer.status != 200:
            raise NodeFault(f"the download was refused with {answer.status}")
        while chunk := answer.read(READ_BYTES):
            take(chunk)
    except (OSError, http.client.HTTPException) as error:
        raise NodeFault(f"the download broke: {type(error).__name__}") from error
    finally:
        connection.close()


def _target(url: SplitResult) -> str:
    return f"{url.path}?{url.query}" if url.query else url.path


def _connect(connection: http.client.HTTPConnection) -> None:
    connection.connect()
    connection.sock.settimeout(SILENCE_S)


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    assert url.hostname is not None
    if url.scheme == "https":
        return http.client.HTTPSConnection(
            url.hostname, url.port, timeout=CONNECT_S, context=ssl.create_default_context()
        )
    return http.client.HTTPConnection(url.hostname, url.port, timeout=CONNECT_S)
