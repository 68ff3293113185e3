"""A stage's process: who may call it, what it says when it is ready, how it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fanlight.channel import open_channel
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from fanlight.queue.v1 import queue_pb2
from services.kernel.config import CommonSettings, SettingsError
from services.worker import serve
from services.worker.admission import Admission
from services.worker.device import DeviceLost, DeviceState
from services.worker.joining import JoinRefused
from services.worker.loop import WorkerLimits, WorkerSettings
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
    capsys: pytest.CaptureFixture[str],
    *,
    settings: WorkerSettings | None = None,
    listen: str = "127.0.0.1:0",
    environ: dict[str, str] | None = None,
    stage: FakeStage | None = None,
    **common: Any,
) -> AsyncIterator[str]:
    """The address that it says it listens on."""
    stop = asyncio.Event()
    serving = serve_stage(
        stage or FakeStage(),
        Admission(slots=1, waiting_limit=1),
        server(listen),
        settings=settings or WorkerSettings(),
        common=CommonSettings(**({"drain_grace_s": 1.0} | common)),
        stop=stop,
        environ={} if environ is None else environ,
    )
    task = asyncio.create_task(serving)
    yield await printed_address(capsys, task)
    stop.set()
    await asyncio.wait_for(task, 20)


async def printed_address(capsys: pytest.CaptureFixture[str], task: "asyncio.Task[None]") -> str:
    printed = ""
    async with asyncio.timeout(20):
        while "ready grpc=" not in printed:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
            printed += capsys.readouterr().out
    ready = next(line for line in printed.splitlines() if line.startswith("ready grpc="))
    return ready.removeprefix("ready grpc=")


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


def local(address: str) -> str:
    return f"127.0.0.1:{address.rpartition(':')[2]}"


async def code_of_direct_call(address: str, *, token: str = "") -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await list_annotators(address, token=token)
    return raised.value.code()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0"])
async def test_with_a_token_of_their_own_direct_calls_are_on_and_need_it(
    capsys: pytest.CaptureFixture[str], listen: str
) -> None:
    settings = WorkerSettings(direct_token="direct")
    async with served(capsys, settings=settings, listen=listen, worker_token="workers") as address:
        await list_annotators(local(address), token="direct")
        for token in ("", "workers", "another"):
            assert await code_of_direct_call(local(address), token=token) == grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_that_every_node_has_does_not_turn_on_direct_calls() -> None:
    with pytest.raises(SettingsError, match="must be another one than FANLIGHT_WORKER_TOKEN"):
        await serve_stage(
            FakeStage(),
            Admission(slots=1, waiting_limit=1),
            server(),
            settings=WorkerSettings(direct_token="workers"),
            common=CommonSettings(worker_token="workers"),
            stop=asyncio.Event(),
            environ={},
        )


async def test_the_token_of_direct_calls_comes_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("direct\n")
    async with served(capsys, settings=WorkerSettings(direct_token_file=tmp_path / "token")) as address:
        await list_annotators(address, token="direct")


async def test_off_loopback_a_worker_answers_health_alone_and_leases(
    capsys: pytest.CaptureFixture[str], gateway: FakeGateway
) -> None:
    await gateway.offer(task_named("jobs/a/tasks/1"))
    settings = WorkerSettings(gateway=gateway.address)
    async with served(capsys, settings=settings, listen="0.0.0.0:0", worker_token="workers") as address:
        await gateway.until(lambda: gateway.results["jobs/a/tasks/1"] == 1)
        assert await code_of_direct_call(local(address), token="workers") == grpc.StatusCode.UNIMPLEMENTED
        async with open_channel(local(address)) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            reflecting = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
            )
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await anext(aiter(reflecting))
            assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_certificate_of_the_fleet_does_not_allow_direct_calls(
    capsys: pytest.CaptureFixture[str], gateway: FakeGateway, tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    authority.cert_pem.write_to_path(str(tmp_path / "roots"))
    files = {
        "tls_cert_file": tmp_path / "cert",
        "tls_key_file": tmp_path / "key",
        "tls_client_ca_file": tmp_path / "roots",
    }
    settings = WorkerSettings(gateway=gateway.address)
    async with served(capsys, settings=settings, listen="0.0.0.0:0", **files) as address:
        # Health alone, and without TLS, which the probes of platforms do not speak.
        assert await code_of_direct_call(local(address)) == grpc.StatusCode.UNIMPLEMENTED


async def test_the_operators_token_is_dropped_and_opens_nothing(
    capsys: pytest.CaptureFixture[str], gateway: FakeGateway
) -> None:
    environ = {"FANLIGHT_CLIENT_TOKEN": "operator", "FANLIGHT_WORKER_NODE": "n"}
    settings = WorkerSettings(gateway=gateway.address)
    async with served(capsys, settings=settings, environ=environ) as address:
        assert environ == {"FANLIGHT_WORKER_NODE": "n"}
        for token in ("", "operator"):
            assert await code_of_direct_call(address, token=token) == grpc.StatusCode.UNIMPLEMENTED


async def test_a_worker_without_gateway_and_without_direct_calls_does_not_start() -> None:
    with pytest.raises(SettingsError, match=r"set FANLIGHT_WORKER_GATEWAY .* FANLIGHT_WORKER_DIRECT_TOKEN"):
        await serve_stage(
            FakeStage(),
            Admission(slots=1, waiting_limit=1),
            server("0.0.0.0:0"),
            settings=WorkerSettings(),
            common=CommonSettings(),
            stop=asyncio.Event(),
            environ={},
        )


async def test_a_draining_worker_says_so_until_its_tasks_have_ended(
    capsys: pytest.CaptureFixture[str], gateway: FakeGateway
) -> None:
    stage, stop = FakeStage(holds=True), asyncio.Event()
    await gateway.offer(task_named("jobs/a/tasks/1"))
    serving = serve_stage(
        stage,
        Admission(slots=1, waiting_limit=1),
        server(),
        settings=WorkerSettings(gateway=gateway.address),
        common=CommonSettings(drain_grace_s=20.0),
        stop=stop,
        environ={},
    )
    task = asyncio.create_task(serving)
    address = await printed_address(capsys, task)
    await stage.until_running("jobs/a/tasks/1")
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stop.set()
        async for change in stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=20):
            if change.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
        call = stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=10)
        assert (await call).status == health_pb2.HealthCheckResponse.SERVING
        assert dict(await call.trailing_metadata())["fanlight-health"] == "draining"
        assert await code_of_direct_call(address) == grpc.StatusCode.UNAVAILABLE
    await stage.let_go()
    await asyncio.wait_for(task, 20)
    assert gateway.results["jobs/a/tasks/1"] == 1


async def test_a_worker_that_the_gateway_never_takes_ends_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "WorkerLimits", lambda: WorkerLimits(refused_exit_s=0.0))
    async with FakeGateway(token="workers") as gateway:
        with pytest.raises(ExceptionGroup) as raised:
            await serve_stage(
                FakeStage(),
                Admission(slots=1, waiting_limit=1),
                server(),
                settings=WorkerSettings(gateway=gateway.address),
                common=CommonSettings(worker_token="clients"),
                stop=asyncio.Event(),
                environ={},
            )
    assert raised.group_contains(JoinRefused, match="set FANLIGHT_WORKER_JOIN_CODE")


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
    assert await asyncio.wait_for(left, 20) == DeviceLost.exit_code
    assert stop.is_set()
    hangs.set()
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(task, 20)
