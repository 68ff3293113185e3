"""Every request is looked at before its handler reads it, whatever the form of the call: one message or a stream."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.protobuf.struct_pb2 import Struct

from services.kernel.config import CommonSettings
from services.kernel.errors_wire import from_rpc_error
from services.kernel.grpc_server import RpcServer

SERVICE = "fanlight.test.v1.EchoService"
FORMS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Echo:
    """Answers with what it got, in all four forms."""

    def __init__(self) -> None:
        self.reached: list[float] = []

    async def unary_unary(self, request: Struct, context: object) -> Struct:
        self.reached.append(request["steps"])
        return request

    async def unary_stream(self, request: Struct, context: object) -> AsyncIterator[Struct]:
        yield await self.unary_unary(request, context)

    async def stream_unary(self, requests: AsyncIterator[Struct], context: object) -> Struct:
        return [await self.unary_unary(each, context) async for each in requests][-1]

    async def stream_stream(self, requests: AsyncIterator[Struct], context: object) -> AsyncIterator[Struct]:
        async for each in requests:
            yield await self.unary_unary(each, context)

    def add_to(self, server: grpc.aio.Server) -> None:
        handlers = {
            form: getattr(grpc, f"{form}_rpc_method_handler")(
                getattr(self, form), Struct.FromString, Struct.SerializeToString
            )
            for form in FORMS
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def number(value: float) -> Struct:
    sent = Struct()
    sent["steps"] = value
    return sent


async def call(channel: grpc.aio.Channel, form: str, sent: list[Struct]) -> None:
    opened = getattr(channel, form)(f"/{SERVICE}/{form}", Struct.SerializeToString, Struct.FromString)
    answer = opened(iter(sent) if form.startswith("stream") else sent[-1], timeout=30)
    if form.endswith("stream"):
        async for _ in answer:
            pass
    else:
        await answer


@pytest.mark.parametrize("form", FORMS)
async def test_a_number_that_is_not_finite_is_refused_before_the_handler_sees_it(form: str) -> None:
    echo = Echo()
    server = RpcServer(CommonSettings(drain_grace_s=0), services={SERVICE: echo.add_to}, tokens={}, default_tokens=())
    port = server.bind("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await call(channel, form, [number(4.0)])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, form, [number(5.0), number(float("nan"))])
    finally:
        await server.stop()
    refused = from_rpc_error(caught.value)
    assert (refused.reason, refused.field, refused.message) == ("INVALID_FIELD", "steps", "is not a finite number")
    assert echo.reached == ([4.0, 5.0] if form.startswith("stream") else [4.0])
