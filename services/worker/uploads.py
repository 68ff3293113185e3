"""Bytes sent past the gateway, to an address that it gave for them. Knows no storage and holds no credentials."""

import asyncio
import http.client
import ssl
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from services.kernel.errors import NodeFault

# Between two signs of life; a slow link may take long for the whole.
SILENCE_S = 60.0
# The storage has the bytes already: somebody else sent the same.
_PRESENT = 412


async def put(url: str, headers: Mapping[str, str], data: bytes) -> None:
    """NodeFault when the bytes are not there afterwards."""
    await asyncio.to_thread(_put, urlsplit(url), headers, data)


def _put(url: SplitResult, headers: Mapping[str, str], data: bytes) -> None:
    connection = _connection(url)
    try:
        connection.request("PUT", f"{url.path}?{url.query}" if url.query else url.path, data, dict(headers))
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise NodeFault(f"the upload broke: {type(error).__name__}") from error
    finally:
        connection.close()
    if not 200 <= status < 300 and status != _PRESENT:
        raise NodeFault(f"the upload was refused with {status}")


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    assert url.hostname is not None
    if url.scheme == "https":
        return http.client.HTTPSConnection(
            url.hostname, url.port, timeout=SILENCE_S, context=ssl.create_default_context()
        )
    return http.client.HTTPConnection(url.hostname, url.port, timeout=SILENCE_S)
