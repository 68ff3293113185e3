"""Random calls of every method that the gateway's reflection names."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.fuzz.neighbors import OPERATOR_TOKEN, ROLES, Neighbors
from tests.fuzz.random_messages import RandomMessages

# Health's and reflection's own are no services of ours.
OURS = "fanlight."
# What may be in a field of type Any.
PACKED = ("fanlight.diffusion.v1.GenerateRequest", "fanlight.preprocessor.v1.AnnotateRequest")
CALL_LIMIT_S, STREAM_LIMIT_S, RESPONSES_MOST, REQUESTS_MOST = 0.3, 5.0, 4, 4
FAILURES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
GARBAGE_SHARE = 0.05


@dataclass
class Answer:
    code: grpc.StatusCode
    # Every byte of it.
    text: bytes


def _proof(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


async def reflected(channel: grpc.aio.Channel) -> tuple[DescriptorPool, Sequence[MethodDescriptor]]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed = await _reflect(stub, [reflection_pb2.ServerReflectionRequest(list_services="")])
    services = [each.name for each in listed[0].list_services_response.service if each.name.startswith(OURS)]
    symbols = [*services, *PACKED]
    files: dict[str, FileDescriptorProto] = {}
    for answer in await _reflect(
        stub, [reflection_pb2.ServerReflectionRequest(file_containing_symbol=each) for each in symbols]
    ):
        for text in answer.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(text)
            files[file.name] = file
    pool = DescriptorPool()
    while files:
        for name in [name for name, file in files.items() if not files.keys() & set(file.dependency)]:
            pool.Add(files.pop(name))
    return pool, [method for name in services for method in pool.FindServiceByName(name).methods]


async def _reflect(stub: Any, asked: Sequence[Any]) -> list[Any]:
    return [answer async for answer in stub.ServerReflectionInfo(iter(asked), metadata=_proof(OPERATOR_TOKEN))]


async def fuzz(found: Neighbors, *, calls: int, seed: int, roles: Sequence[str] = ROLES) -> list[str]:
    """What went wrong, a line each."""
    async with found.gateway.channel() as channel:
        pool, methods = await reflected(channel)
        assert len(methods) > 40
        made = RandomMessages(pool, seed, [pool.FindMessageTypeByName(name) for name in PACKED])
        wrong: list[str] = []
        for number in range(calls):
            role, method = roles[number % len(roles)], methods[(number // len(roles)) % len(methods)]
            made.names = found.names_for(role)
            wrong += await _one(found, channel, made, role, method)
        return wrong


async def _one(
    found: Neighbors, channel: grpc.aio.Channel, made: RandomMessages, role: str, method: MethodDescriptor
) -> list[str]:
    count = made.random.randint(1, REQUESTS_MOST) if method.client_streaming else 1
    sent = [made.any_message(method.input_type).SerializeToString() for _ in range(count)]
    if made.random.random() < GARBAGE_SHARE:
        sent[-1] = made.random.randbytes(made.random.randint(1, 40))
    answer = await call(channel, found.gateway.grpc, method, sent, token=found.tokens.get(role, ""))
    what = f"{method.full_name} as {role}: {answer.code.name} {answer.text[:300]!r}, asked {sent!r}"
    wrong = [f"server error: {what}"] if answer.code in FAILURES else []
    wrong += [f"leak of {secret!r}: {what}" for secret in found.leaked(role, b"".join(sent), answer.text)]
    if answer.code is grpc.StatusCode.UNAUTHENTICATED and role in found.tokens and not await found.is_valid(role):
        await found.renew(role)
    return wrong


async def call(
    channel: grpc.aio.Channel, target: str, method: MethodDescriptor, sent: Sequence[bytes], *, token: str
) -> Answer:
    assert method.containing_service is not None
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        return await asyncio.to_thread(_stream, target, path, sent, token)
    running: Any = channel.unary_stream(path)(sent[0], timeout=CALL_LIMIT_S, metadata=_proof(token))
    text = b""
    try:
        for _ in range(RESPONSES_MOST):
            part = await running.read()
            if part is grpc.aio.EOF:
                break
            text += part
        else:
            running.cancel()
            return Answer(grpc.StatusCode.OK, text)
        return Answer(await running.code(), text + await _words(running))
    except grpc.aio.AioRpcError as error:
        return Answer(error.code(), text + (error.details() or "").encode() + repr(error.trailing_metadata()).encode())


async def _words(running: Any) -> bytes:
    """How it ended."""
    return (await running.details() or "").encode() + repr(tuple(await running.trailing_metadata() or ())).encode()


def _stream(target: str, path: str, sent: Sequence[bytes], token: str) -> Answer:
    """By grpc's other client: asyncio's own says INTERNAL where a server answers before it was told everything."""
    with grpc.insecure_channel(target) as channel:
        running: Any = channel.stream_stream(path)(iter(sent), timeout=STREAM_LIMIT_S, metadata=_proof(token))
        text = b""
        try:
            for part in running:
                text += part
        except grpc.RpcError:
            text += (running.details() or "").encode() + repr(running.trailing_metadata()).encode()
        return Answer(running.code(), text)
