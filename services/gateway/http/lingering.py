"""What becomes of a body that is answered before it has all come.

Most clients send all of a body before they read the answer, and closing at once would reset the connection under
them. So the answer goes out, what still comes is thrown away for a while, and only then the connection is closed.
"""

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_LIMIT_BYTES = 256 * 1024 * 1024
LINGER_LIMIT_S = 30.0


class Lingering:
    def __init__(self, app: ASGIApp, idle_s: float) -> None:
        """`idle_s`: how long the rest of a body may stop coming before it is given up."""
        self._app = app
        self._idle_s = idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        # One who asks first, and was not told to go on, sends nothing after such an answer.
        asks = "expect" in headers
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def watched_receive() -> Message:
            nonlocal asks, unread
            asks = False
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                unread = False
            return message

        async def watched_send(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif unread and not asks and not message.get("more_body"):
                await send({**message, "more_body": True})
                await self._discard(receive)
                message = {"type": "http.response.body"}
            await send(message)

        await self._app(scope, watched_receive, watched_send)

    async def _discard(self, receive: Receive) -> None:
        """Until the body or the connection ends, or a limit is met."""
        size_bytes, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_LIMIT_S):
                while more and size_bytes < LINGER_LIMIT_BYTES:
                    async with asyncio.timeout(self._idle_s):
                        message = await receive()
                    size_bytes += len(message.get("body", b""))
                    more = message.get("more_body", False)
