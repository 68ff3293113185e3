"""What a target may answer before its answer, and how much."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network

import pytest

from fanlight.errors import Unavailable
from services.gateway.adapters.webhook_http import ANSWER_LIMIT_BYTES, WebhookHttp

LOOPBACK = (ip_network("127.0.0.0/8"),)


@asynccontextmanager
async def answering(*parts: bytes) -> AsyncIterator[Callable]:
    """Posts to a target that answers so, and then leaves."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        for part in parts:
            writer.write(part)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        yield lambda: WebhookHttp(LOOPBACK).post(url, {}, b"{}")


async def test_what_is_said_before_the_answer_is_no_answer() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    async with answering(early, early, b"HTTP/1.1 204 No Content\r\n\r\n") as post:
        assert await post() == 204


@pytest.mark.parametrize("more_bytes", [0, 2 * ANSWER_LIMIT_BYTES])
async def test_an_answer_whose_head_does_not_end_within_the_limit_is_none(more_bytes: int) -> None:
    long = b"HTTP/1.1 200 OK\r\nx: " + b"x" * more_bytes + b"\r\n\r\n"
    async with answering(long) as post:
        if not more_bytes:
            assert await post() == 200
        else:
            with pytest.raises(Unavailable, match="does not answer in HTTP"):
                await post()
