"""The health service over real gRPC: what each state means for each probe, and who may watch."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fanlight.channel import open_channel
from fanlight.gateway.v1 import gateway_pb2_grpc
from services.kernel.config import CommonSettings
from services.kernel.grpc_server import RpcServer
from services.kernel.health import DRAINING, READY, STARTING, HealthService, HealthState
from tests.fakes.job_service import FakeJobService

SERVICE = "fanlight.gateway.v1.JobService"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)
LOST = HealthState(name="device_lost", message="start it again", is_alive=False, is_ready=False, is_serving=False)
AWAY = HealthState(name="gateway_unreachable", is_ready=False)


class Server:
    """A server whose state the test decides."""

    def __init__(self):
        self.state = READY
        self.rpc = RpcServer(
            # Long: no test may wait for it.
            CommonSettings(drain_grace_s=120),
            services={SERVICE: lambda s: gateway_pb2_grpc.add_JobServiceServicer_to_server(FakeJobService(), s)},
            tokens={},
            default_tokens=("token",),
            get_health=self._get,
        )

    async def _get(self):
        return self.state

    async def become(self, state):
        self.state = state
        await self.rpc.health.look()


@pytest.fixture
async def server():
    server = Server()
    server.address = f"127.0.0.1:{server.rpc.bind('127.0.0.1:0')}"
    await server.rpc.start()
    yield server
    await server.rpc.stop(grace_s=0)


@asynccontextmanager
async def health_of(server):
    async with open_channel(server.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def asked(service=""):
    return health_pb2.HealthCheckRequest(service=service)


async def answers(stub):
    """Whether startup, liveness, readiness, the server and its service are serving."""
    return [
        (await stub.Check(asked(name), timeout=10)).status == SERVING
        for name in ("startup", "liveness", "readiness", "", SERVICE)
    ]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (READY, [True, True, True, True, True]),
        (AWAY, [True, True, False, True, True]),
        (DRAINING, [True, True, False, False, False]),
        (LOST, [True, False, False, False, False]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
async def test_each_state_answers_each_probe(server, state, expected):
    await server.rpc.set_serving(True)
    await server.become(state)
    async with health_of(server) as stub:
        assert await answers(stub) == expected
        call = stub.Check(asked("readiness"), timeout=10)
        await call
        told = dict(await call.trailing_metadata())
    assert (told["fanlight-health"], told.get("fanlight-health-message", "")) == (state.name, state.message)


async def test_a_server_that_is_not_open_yet_is_starting_and_alive(server):
    async with health_of(server) as stub:
        assert await answers(stub) == [False, True, False, False, False]
        await server.rpc.set_serving(True)
        assert await answers(stub) == [True] * 5


async def test_an_unknown_service_is_not_found_by_check(server):
    async with health_of(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Check(asked("nobody"), timeout=10)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert "startup, liveness, readiness" in raised.value.details()


async def test_list_has_every_service(server):
    await server.rpc.set_serving(True)
    async with health_of(server) as stub:
        listed = await stub.List(health_pb2.HealthListRequest(), timeout=10)
    assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(
        ["", "startup", "liveness", "readiness", SERVICE], SERVING
    )


async def test_watch_says_the_present_status_and_then_each_change_of_it(server):
    await server.rpc.set_serving(True)
    async with health_of(server) as stub:
        watch = stub.Watch(asked("readiness"), timeout=20)
        assert (await watch.read()).status == SERVING
        # Ready as before: no message.
        await server.become(HealthState(name="full"))
        await server.become(AWAY)
        assert (await watch.read()).status == NOT_SERVING
        await server.become(READY)
        assert (await watch.read()).status == SERVING


async def test_the_server_notices_a_change_by_itself(server):
    await server.rpc.set_serving(True)
    async with health_of(server) as stub:
        watch = stub.Watch(asked("liveness"), timeout=20)
        assert (await watch.read()).status == SERVING
        server.state = LOST
        assert (await watch.read()).status == NOT_SERVING


async def test_watch_of_an_unknown_service_says_so_and_stays_open(server):
    async with health_of(server) as stub:
        watch = stub.Watch(asked("nobody"), timeout=20)
        assert (await watch.read()).status == SERVICE_UNKNOWN
        await server.become(AWAY)
        assert not watch.done()


async def test_stopping_ends_every_watch_with_its_last_status_and_waits_for_none(server):
    await server.rpc.set_serving(True)
    async with health_of(server) as stub:
        watch = stub.Watch(asked(), timeout=60)
        assert (await watch.read()).status == SERVING
        async with asyncio.timeout(30):
            await server.rpc.stop()
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


async def test_a_state_that_comes_late_does_not_hide_the_draining():
    ask = asyncio.Event()

    async def late():
        await ask.wait()
        return READY

    service = HealthService([], late)
    opening = asyncio.create_task(service.open())
    await asyncio.sleep(0)
    await service.drain()
    ask.set()
    await opening
    assert service._state == DRAINING


async def test_a_process_that_needs_a_restart_says_so_while_it_drains():
    lost = HealthState(name="device_lost", is_alive=False, is_ready=False, is_serving=False)
    states = [READY, lost]

    async def get_state():
        return states.pop(0)

    service = HealthService([], get_state)
    await service.open()
    await service.look()
    await service.drain()
    assert service._state == lost


def test_a_starting_process_is_alive():
    assert STARTING.is_alive
