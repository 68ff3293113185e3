"""What the gateway is compared with: a bare grpc.aio server that echoes, forwards bytes to another one, and keeps bytes
in memory and gives them back.

usage: python -m benchmarks.gateway_bare [PORT TO FORWARD TO]; prints its port.
"""

import asyncio
import sys
from typing import Any

import grpc
import grpc.aio

CHUNK_BYTES = 256 * 1024
SERVICE = "bare.Bare"


class Bare:
    def __init__(self, onward: grpc.aio.Channel | None) -> None:
        self.kept: dict[bytes, list[bytes]] = {}
        self.drain: Any = onward.stream_unary(f"/{SERVICE}/Drain") if onward else None

    async def forward(self, requests: Any, context: Any) -> bytes:
        """Every chunk goes on as it comes; the answer comes back from the other end."""
        assert self.drain is not None
        return await self.drain(requests)  # type: ignore[no-any-return]

    async def swallow(self, requests: Any, context: Any) -> bytes:
        """The other end of a forward."""
        return str(sum([len(chunk) async for chunk in requests])).encode()

    async def echo(self, request: bytes, context: Any) -> bytes:
        return request

    async def take(self, requests: Any, context: Any) -> bytes:
        """The first message is a name."""
        name, *chunks = [chunk async for chunk in requests]
        self.kept[name] = chunks
        return b"ok"

    async def give(self, name: bytes, context: Any) -> Any:
        for chunk in self.kept.pop(name):
            yield chunk


async def main(onward: str) -> None:
    bare = Bare(grpc.aio.insecure_channel(f"127.0.0.1:{onward}") if onward else None)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1 << 26)])
    methods: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(bare.echo),
        "Forward": grpc.stream_unary_rpc_method_handler(bare.forward),
        "Drain": grpc.stream_unary_rpc_method_handler(bare.swallow),
        "Take": grpc.stream_unary_rpc_method_handler(bare.take),
        "Give": grpc.unary_stream_rpc_method_handler(bare.give),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else ""))
