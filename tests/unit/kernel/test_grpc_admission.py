"""Who is let in over real gRPC: refused by metadata alone, places of their own, and what gives way to whom."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fanlight.preprocessor.v1 import preprocessor_pb2 as pb
from fanlight.preprocessor.v1 import preprocessor_pb2_grpc as pb_grpc
from services.kernel.config import CommonSettings
from services.kernel.grpc_admission import CallAdmission, CallLimits, TokenInterceptor, address_of_peer
from services.kernel.grpc_guards import ErrorInterceptor
from services.kernel.grpc_server import RpcServer

SERVICE = "fanlight.preprocessor.v1.PreprocessorService"
ANNOTATE, LIST = f"/{SERVICE}/Annotate", f"/{SERVICE}/ListAnnotators"
CHECK = "/grpc.health.v1.Health/Check"
RIGHT = (("authorization", "bearer right"),)
REFUSED = grpc.StatusCode.UNAUTHENTICATED


class Servicer(pb_grpc.PreprocessorServiceServicer):
    """Annotate waits until it is allowed to end."""

    def __init__(self):
        self.allowed = asyncio.Event()
        self.started = self.running = 0

    async def Annotate(self, request, context):
        self.started += 1
        self.running += 1
        try:
            await self.allowed.wait()
        finally:
            self.running -= 1
        return pb.AnnotateResponse()

    async def ListAnnotators(self, request, context):
        return pb.ListAnnotatorsResponse()


@asynccontextmanager
async def serving(*, token="right", **options):
    servicer = Servicer()
    server = RpcServer(
        CommonSettings(drain_grace_s=0),
        services={SERVICE: lambda s: pb_grpc.add_PreprocessorServiceServicer_to_server(servicer, s)},
        tokens={},
        default_tokens=(token,) if token else (),
        **options,
    )
    port = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        servicer.allowed.set()
        await server.stop()


def without_message(channel, path, metadata=()):
    """A call that never sends its message."""
    return channel.stream_unary(path)(metadata=metadata, timeout=60)


async def code_of(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def until(truth):
    async with asyncio.timeout(30):
        while not truth():  # noqa: ASYNC110  # what is waited for happens in gRPC's own code
            await asyncio.sleep(0.01)


async def test_a_call_without_a_token_is_refused_before_its_message():
    async with serving() as (_, address), grpc.aio.insecure_channel(address) as channel:
        assert await code_of(without_message(channel, ANNOTATE)) == REFUSED


async def test_calls_without_a_token_and_a_message_take_no_place():
    limits = CallLimits(calls=1, unread=1)
    async with serving(limits=limits) as (_, address), grpc.aio.insecure_channel(address) as channel:
        strangers = [without_message(channel, path) for path in [LIST, "/fanlight.none.v1.None/Such"] * 50]
        assert {await code_of(call) for call in strangers} == {REFUSED}
        stub = pb_grpc.PreprocessorServiceStub(channel)
        assert await stub.ListAnnotators(pb.ListAnnotatorsRequest(), metadata=RIGHT, timeout=30) is not None


async def test_two_authorizations_are_refused_even_if_one_is_right():
    async with serving() as (_, address), grpc.aio.insecure_channel(address) as channel:
        for twice in (RIGHT * 2, (*RIGHT, ("authorization", "bearer wrong"))):
            with pytest.raises(grpc.aio.AioRpcError, match="send `authorization` once"):
                await without_message(channel, LIST, twice)


async def test_two_authorizations_are_refused_where_no_token_is_needed():
    async with serving(token="") as (_, address), grpc.aio.insecure_channel(address) as channel:
        assert await code_of(without_message(channel, LIST, RIGHT * 2)) == REFUSED


async def test_a_method_with_places_of_its_own_fills_only_those():
    async with serving(places={ANNOTATE: 1}) as (servicer, address), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.PreprocessorServiceStub(channel)
        first = stub.Annotate(pb.AnnotateRequest(), metadata=RIGHT, timeout=60)
        await until(lambda: servicer.running)
        with pytest.raises(grpc.aio.AioRpcError, match="1 calls of this kind run already") as caught:
            await stub.Annotate(pb.AnnotateRequest(), metadata=RIGHT, timeout=30)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await stub.ListAnnotators(pb.ListAnnotatorsRequest(), metadata=RIGHT, timeout=30)
        servicer.allowed.set()
        await first
        await stub.Annotate(pb.AnnotateRequest(), metadata=RIGHT, timeout=30)


async def test_a_place_is_free_again_when_its_caller_is_gone():
    async with serving(places={ANNOTATE: 1}) as (servicer, address), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.PreprocessorServiceStub(channel)
        for number in range(1, 4):
            call = stub.Annotate(pb.AnnotateRequest(), metadata=RIGHT, timeout=60)
            await until(lambda number=number: servicer.started == number)
            call.cancel()
            await until(lambda: servicer.running == 0)


async def test_calls_with_a_token_take_no_place_before_their_message():
    async with serving(limits=CallLimits(calls=1)) as (_, address), grpc.aio.insecure_channel(address) as channel:
        waiting = [without_message(channel, LIST, RIGHT) for _ in range(50)]
        stub = pb_grpc.PreprocessorServiceStub(channel)
        assert await stub.ListAnnotators(pb.ListAnnotatorsRequest(), metadata=RIGHT, timeout=30) is not None
        assert not any(call.done() for call in waiting)
        for call in waiting:
            call.cancel()


async def test_calls_with_a_token_have_a_limit_in_all():
    limits = CallLimits(calls=1, open_calls=1, unread=1)
    async with serving(limits=limits) as (_, address), grpc.aio.insecure_channel(address) as channel:
        waiting = [without_message(channel, LIST, RIGHT) for _ in range(4)]
        await until(lambda: any(call.done() for call in waiting))
        ended = [call for call in waiting if call.done()]
        assert [await code_of(call) for call in ended] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        for call in waiting:
            call.cancel()


async def test_a_health_call_that_ends_without_its_message_is_an_invalid_argument():
    async with serving() as (_, address), grpc.aio.insecure_channel(address) as channel:
        call = without_message(channel, CHECK)
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError, match="request: is missing"):
            await call


async def test_health_answers_beside_messages_that_never_come():
    limits = CallLimits(open_calls_per_address=4, open_calls=8)
    async with serving(limits=limits) as (_, address), grpc.aio.insecure_channel(address) as channel:
        strangers = [without_message(channel, CHECK) for _ in range(20)]
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)).status
        await until(lambda: sum(call.done() for call in strangers) >= 16)
        for call in strangers:
            call.cancel()


async def test_the_message_of_a_health_call_has_a_deadline():
    async with (
        serving(limits=CallLimits(open_read_s=0.05)) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=r"did not come within 0\.05 s") as caught:
            await without_message(channel, CHECK)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


class WatchedHealth(health_pb2_grpc.HealthServicer):
    """Watch sends one status and then waits."""

    def __init__(self):
        self.watched = 0

    async def Watch(self, request, context):
        self.watched += 1
        try:
            yield health_pb2.HealthCheckResponse()
            await asyncio.Event().wait()
        finally:
            self.watched -= 1


async def test_watches_of_a_stranger_give_way_and_one_with_a_token_stays():
    health = WatchedHealth()
    admission = CallAdmission(limits=CallLimits(open_calls_per_address=2), tokens=("right",))
    server = grpc.aio.server(interceptors=[TokenInterceptor({}, default=("right",)), ErrorInterceptor(admission)])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        own = stub.Watch(health_pb2.HealthCheckRequest(), metadata=RIGHT, timeout=60)
        await own.read()
        strangers = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(5)]
        for call in strangers[-2:]:
            await call.read()
        for call in strangers[:3]:
            with pytest.raises(grpc.aio.AioRpcError, match="too many calls are open"):
                async for _ in call:
                    pass
        await until(lambda: health.watched == 3)
        assert not own.done()
        for call in [own, *strangers]:
            call.cancel()
        await until(lambda: health.watched == 0)
        assert len(admission._unproven) == 0
    await server.stop(0)


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:127.0.0.1:5", "127.0.0.1"), ("ipv6:%5B::1%5D:5", "::1"), ("ipv6:[::1]:5", "::1"), ("unix:", "unix:")],
)
def test_the_address_of_a_peer(peer, address):
    assert address_of_peer(peer) == address
