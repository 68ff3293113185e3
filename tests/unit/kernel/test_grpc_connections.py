"""Connections without calls to a real gRPC server: the oldest of an address are ended, proven ones stay."""

import asyncio
import socket

import grpc
import grpc.aio
import pytest

from services.kernel.grpc_connections import GrpcConnections, PeerLimits, parse_peer

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
METHOD = "/a.Service/Method"


class Probe(grpc.aio.ServerInterceptor):
    """Answers every call, and tells its peer."""

    def __init__(self, connections):
        self.connections = connections

    async def intercept_service(self, continuation, details):
        async def answer(request, context):
            self.connections.prove(context.peer())
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
async def served():
    connections = GrpcConnections(PeerLimits(unproven=4, unproven_per_address=2))
    server = grpc.aio.server(interceptors=[Probe(connections)])
    port = server.add_insecure_port("127.0.0.1:0")
    connections.listen_on(port)
    await server.start()
    yield connections, port
    await server.stop(0)


async def connected(port, source, sent=PREFACE):
    def connect():
        connection = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))
        connection.sendall(sent)
        # The server's own settings: it has accepted the connection.
        connection.recv(100)
        connection.settimeout(10)
        return connection

    return await asyncio.to_thread(connect)


def close_all(sockets):
    for each in sockets:
        each.close()


async def is_closed(connection):
    def read():
        try:
            while connection.recv(1000):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    return await asyncio.to_thread(read)


async def test_the_oldest_connections_of_an_address_are_ended(served):
    connections, port = served
    strangers = [await connected(port, "127.0.0.2") for _ in range(3)]
    other = await connected(port, "127.0.0.3")
    assert connections.sweep() == 0
    strangers += [await connected(port, "127.0.0.2") for _ in range(2)]
    assert connections.sweep() == 3
    assert all([await is_closed(each) for each in strangers[:3]])
    for each in (*strangers[3:], other):
        each.settimeout(0.1)
        assert not await is_closed(each)
    close_all([*strangers, other])


async def test_a_connection_with_a_call_that_was_let_in_stays_among_a_strangers_from_its_address(served):
    connections, port = served
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary(METHOD)(b"", timeout=30) == b""
        strangers = [await connected(port, "127.0.0.1") for _ in range(5)]
        assert [connections.sweep() for _ in range(3)] == [0, 3, 0]
        assert channel.get_state() == grpc.ChannelConnectivity.READY
        assert await channel.unary_unary(METHOD)(b"", timeout=30) == b""
    close_all(strangers)


async def test_all_addresses_together_have_a_limit(served):
    connections, port = served
    strangers = [await connected(port, f"127.0.0.{last}") for last in range(2, 8)]
    assert [connections.sweep() for _ in range(3)] == [0, 2, 0]
    close_all(strangers)


async def test_other_sockets_of_the_process_are_left_alone(served):
    connections, _ = served
    listening = socket.create_server(("127.0.0.1", 0))
    pairs = [socket.create_connection(listening.getsockname()) for _ in range(5)]
    assert [connections.sweep() for _ in range(2)] == [0, 0]
    close_all([*pairs, listening])


@pytest.mark.parametrize(
    ("peer", "parsed"),
    [
        ("ipv4:127.0.0.1:5", ("127.0.0.1", 5)),
        ("ipv6:%5B::1%5D:5", ("::1", 5)),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5", ("10.0.0.1", 5)),
        ("unix:/a", None),
    ],
)
def test_a_peer_is_an_address_and_a_port(peer, parsed):
    assert parse_peer(peer) == parsed
