"""A stage's process: who may call it, what it says when it is ready, how it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fanlight.channel import open_channel
from fanlight.errors import DeviceLost
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from fanlight.queue.v1 import queue_pb2
from services.kernel.config import CommonSettings, SettingsError
from services.worker import serve
from services.worker.admission import Admission
from services.worker.device import DeviceState
from services.worker.loop import WorkerSettings
from services.worker.serve import StageServer, serve_stage
from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage
from tests.fakes.worker import task_named

NAME = preprocessor_pb2.DESCRIPTOR.services_by_name["PreprocessorService"].full_name


class Servicer(preprocessor_pb2_grpc.PreprocessorServiceServicer):
    async def ListAnnotators(self, request: Any, context: Any) -> preprocessor_pb2.ListAnnotatorsResponse:
        return preprocessor_pb2.ListAnnotatorsResponse()


def server(listen: str = "127.0.0.1:0") -> StageServer:
    add = preprocessor_pb2_grpc.add_PreprocessorServiceServicer_to_server
    return StageServer(service=NAME, add=lambda rpc: add(Servicer(), rpc), listen=listen)


@asynccontextmanager
async def served(
    capsys: pytest.CaptureFixture[str], *, token: str = "", settings: WorkerSettings | None = None
) -> AsyncIterator[str]:
    """The address it listens on."""
    stop = asyncio.Event()
    common = CommonSettings(client_token=token or None, drain_grace_s=1.0)
    serving = serve_stage(
        FakeStage(),
        Admission(slots=1, waiting_limit=1),
        server(),
        settings=settings or WorkerSettings(),
        common=common,
        stop=stop,
    )
    task = asyncio.create_task(serving)
    printed = ""
    async with asyncio.timeout(20):
        while "\n" not in printed:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
            printed += capsys.readouterr().out
    ready = next(line for line in printed.splitlines() if line.startswith("ready grpc="))
    yield ready.removeprefix("ready grpc=")
    stop.set()
    await asyncio.wait_for(task, 20)


async def list_annotators(address: str, *, token: str = "") -> None:
    async with open_channel(address, token=token) as channel:
        stub = preprocessor_pb2_grpc.PreprocessorServiceStub(channel)
        await stub.ListAnnotators(preprocessor_pb2.ListAnnotatorsRequest(), timeout=10)


async def test_without_a_gateway_a_stage_answers_direct_calls(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(capsys) as address:
        await list_annotators(address)


async def test_a_ready_stage_is_healthy_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(capsys) as address, grpc.aio.insecure_channel(address) as channel:
        for name in ("", NAME):
            request = health_pb2.HealthCheckRequest(service=name)
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_direct_calls_need_the_clients_token(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(capsys, token="a client's") as address:
        await list_annotators(address, token="a client's")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await list_annotators(address, token="another")
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_off_loopback_a_stage_does_not_start_without_a_token() -> None:
    with pytest.raises(SettingsError, match="FANLIGHT_CLIENT_TOKEN"):
        await serve_stage(
            FakeStage(),
            Admission(slots=1, waiting_limit=1),
            server("0.0.0.0:0"),
            settings=WorkerSettings(),
            common=CommonSettings(),
            stop=asyncio.Event(),
        )


async def test_with_a_gateway_it_leases_tasks_beside(capsys: pytest.CaptureFixture[str], gateway: FakeGateway) -> None:
    await gateway.offer(task_named("jobs/a/tasks/1"))
    async with served(capsys, settings=WorkerSettings(gateway=gateway.address)):
        await gateway.until(lambda: gateway.results["jobs/a/tasks/1"] == 1)
    assert gateway.polls[-1].draining


async def test_a_lost_device_fails_its_tasks_by_name_and_ends_the_process(
    capsys: pytest.CaptureFixture[str], gateway: FakeGateway
) -> None:
    stage, device, left = FakeStage(holds=True), DeviceState(), []
    error = DeviceLost("the device has hung").of_part("device:cuda")
    stage.failures["jobs/a/tasks/1"] = error
    await gateway.offer(task_named("jobs/a/tasks/1"))
    serving = serve_stage(
        stage,
        Admission(slots=1, waiting_limit=1),
        server(),
        settings=WorkerSettings(gateway=gateway.address, poll_wait_s=0.1),
        common=CommonSettings(drain_grace_s=20.0),
        stop=asyncio.Event(),
        device=device,
        leave=left.append,
    )
    task = asyncio.create_task(serving)
    await stage.until_running("jobs/a/tasks/1")
    device.lose(error)
    await stage.let_go()
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(task, 20)
    [failed] = gateway.failed["jobs/a/tasks/1"]
    assert (failed.failure.reason, failed.failure.part) == ("DEVICE_LOST", "device:cuda")
    assert failed.fault == queue_pb2.FailTaskRequest.FAULT_NODE
    assert gateway.polls[-1].draining
    assert left == []


async def test_a_process_that_cannot_end_for_what_hangs_in_it_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, device = asyncio.Event(), DeviceState()
    left = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(serve, "LEAVE_S", 0.0)
    hangs = asyncio.Event()
    monkeypatch.setattr(serve, "_lease", lambda *_: hangs.wait())
    serving = serve_stage(
        FakeStage(),
        Admission(slots=1, waiting_limit=1),
        server(),
        settings=WorkerSettings(),
        common=CommonSettings(drain_grace_s=0.0),
        stop=stop,
        device=device,
        leave=left.set_result,
    )
    task = asyncio.create_task(serving)
    device.lose(DeviceLost("the device has hung"))
    assert await asyncio.wait_for(left, 20) == 1
    assert stop.is_set()
    hangs.set()
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(task, 20)
