"""Hooks of an operator's moderation: in this process, over HTTP and over gRPC on loopback."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import grpc.aio

from fanlight.moderation.v1 import moderation_pb2, moderation_pb2_grpc
from services.gateway.app.moderation import ModerationOptions
from services.gateway.domain.moderation import ContentVerdict, Decision
from services.gateway.ports import Question
from services.gateway.wire.moderation import content_of

LOOPBACK = (ip_network("127.0.0.0/8"),)
ALLOW, FLAG = ContentVerdict(decision=Decision.ALLOW), ContentVerdict(decision=Decision.FLAG, labels=("violence",))
BLUR = ContentVerdict(decision=Decision.BLUR, reason="a face")
BLOCK = ContentVerdict(decision=Decision.BLOCK, reason="no knives here", labels=("weapon",))


@dataclass
class FakeHook:
    """Answers requests and results as it is told; what is an error is raised, and None hangs."""

    of_requests: ContentVerdict | Exception | None = ALLOW
    of_results: ContentVerdict | Exception | None = ALLOW
    asked: list[Question] = field(default_factory=list)
    hangs_for: str = ""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def judge(self, question: Question) -> ContentVerdict:
        self.asked.append(question)
        self.arrived.set()
        answer = self.of_results if question.job else self.of_requests
        if answer is None or question.tenant == self.hangs_for:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer


def options(hook: Any, **changes: Any) -> ModerationOptions:
    return ModerationOptions(**{"hook": hook, "content_of": content_of, "timeout_s": 0.5, **changes})


@dataclass
class HttpHook:
    """Raw bytes that an HTTP hook answers, and what it was sent."""

    url: str
    headers: list[Mapping[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)


@asynccontextmanager
async def http_hook(answer: Callable[[Mapping[str, str], bytes], Awaitable[bytes]]) -> AsyncIterator[HttpHook]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        hook.headers.append(headers)
        hook.bodies.append(json.loads(body))
        try:
            writer.write(await answer(headers, body))
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    hook = HttpHook(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/judge")
    try:
        yield hook
    finally:
        server.close()


def http_answer(body: bytes, *, status: str = "200 OK", headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class GrpcHook(moderation_pb2_grpc.ModerationServiceServicer):
    def __init__(self, answer: Callable[[], Awaitable[moderation_pb2.JudgeResponse]]) -> None:
        self._answer = answer
        self.asked: list[moderation_pb2.JudgeRequest] = []
        self.metadata: list[dict[str, str]] = []

    async def Judge(self, request: moderation_pb2.JudgeRequest, context: Any) -> moderation_pb2.JudgeResponse:
        self.asked.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata()})
        return await self._answer()


@asynccontextmanager
async def grpc_hook(hook: GrpcHook) -> AsyncIterator[str]:
    server = grpc.aio.server()
    moderation_pb2_grpc.add_ModerationServiceServicer_to_server(hook, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        await server.stop(None)
