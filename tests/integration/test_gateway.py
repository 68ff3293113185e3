"""The gateway's own process over real gRPC, with workers played by the test."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.fleet import PNG
from tests.fakes.gateway_process import CALL_LIMIT_S, GatewayProcess, RpcWorker, jobs_of

SUCCEEDED = gateway_pb2.Job.STATE_SUCCEEDED


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    process = GatewayProcess(tmp_path / "data", FANLIGHT_DRAIN_GRACE_S="120")
    await process.start()
    yield process
    await process.stop(signal.SIGKILL)


@pytest.fixture
async def channel(gateway: GatewayProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with gateway.channel() as opened:
        yield opened


def generation(count: int, *, request_id: str = "") -> gateway_pb2.CreateJobRequest:
    source = diffusion_pb2.Control(annotator="canny", image=common_pb2.ImageSource(data=PNG + b"photo"))
    work = diffusion_pb2.GenerateRequest(prompt="a fox", count=count, seed=7, controls=[source])
    return gateway_pb2.CreateJobRequest(generation=work, request_id=request_id)


async def workers_of(channel: grpc.aio.Channel) -> tuple[RpcWorker, RpcWorker]:
    annotator, painter = RpcWorker(channel, "preprocess"), RpcWorker(channel, "diffusion")
    await annotator.lease(limit=0)
    await painter.lease(limit=0)
    return annotator, painter


async def test_an_image_and_a_prompt_become_images(channel: grpc.aio.Channel) -> None:
    annotator, painter = await workers_of(channel)
    jobs = jobs_of(channel)
    job = await jobs.CreateJob(generation(3), timeout=CALL_LIMIT_S)
    watching = jobs.WatchJob(gateway_pb2.WatchJobRequest(name=job.name), timeout=CALL_LIMIT_S)
    first = await watching.read()
    assert first.job.revision == job.revision
    open_jobs = await jobs.ListJobs(gateway_pb2.ListJobsRequest(), timeout=CALL_LIMIT_S)
    assert all(each.estimate.ready_s > 0 for each in (job, first.job, *open_jobs.jobs))

    (annotate,) = await annotator.lease()
    request = preprocessor_pb2.AnnotateRequest.FromString(annotate.request.value)
    assert (request.annotator, request.parameters["low_threshold"]) == ("canny", 100)
    await annotator.complete(annotate)
    paints = await painter.lease()
    made = [diffusion_pb2.GenerateRequest.FromString(task.request.value) for task in paints]
    assert [request.seed for request in made] == [7, 8, 9]
    assert made[0].controls[0].controlnet == "canny"
    assert made[0].controls[0].image.blob.size_bytes > 0
    for task in paints:
        await painter.complete(task)

    done = first
    while (event := await watching.read()) is not grpc.aio.EOF:
        done = event
    assert done.job.state == SUCCEEDED
    assert not done.job.HasField("estimate")
    assert [image.seed for image in done.job.images] == [7, 8, 9]
    listed = await jobs.ListJobs(gateway_pb2.ListJobsRequest(state=SUCCEEDED), timeout=CALL_LIMIT_S)
    assert [each.name for each in listed.jobs] == [job.name]


async def test_the_gateway_tells_what_there_is(channel: grpc.aio.Channel) -> None:
    await workers_of(channel)
    jobs = jobs_of(channel)
    annotators = await jobs.ListAnnotators(gateway_pb2.ListAnnotatorsRequest(), timeout=CALL_LIMIT_S)
    models = await jobs.ListModels(gateway_pb2.ListModelsRequest(), timeout=CALL_LIMIT_S)
    workers = await jobs.ListWorkers(gateway_pb2.ListWorkersRequest(), timeout=CALL_LIMIT_S)
    assert {annotator.id for annotator in annotators.annotators} == {"canny", "dream"}
    assert {model.id for model in models.models} == {"starter", "other", "canny"}
    assert [(each.worker.stage, each.live) for each in workers.workers] == [("diffusion", True), ("preprocess", True)]


async def test_a_gateway_killed_in_the_middle_of_jobs_loses_nothing_and_makes_every_image_once(
    gateway: GatewayProcess, channel: grpc.aio.Channel
) -> None:
    annotator, painter = await workers_of(channel)
    jobs = jobs_of(channel)
    made = [await jobs.CreateJob(generation(4, request_id=f"r{i}"), timeout=CALL_LIMIT_S) for i in range(3)]
    (annotate,) = await annotator.lease(limit=1)
    await annotator.complete(annotate)
    leased = await painter.lease(limit=2)

    await gateway.stop(signal.SIGKILL)
    await gateway.start()

    for task in leased:
        await painter.complete(task)
    while await annotator.work() + await painter.work():
        pass
    for job in made:
        done = await jobs.GetJob(gateway_pb2.GetJobRequest(name=job.name), timeout=CALL_LIMIT_S)
        assert done.state == SUCCEEDED
        assert [image.seed for image in done.images] == [7, 8, 9, 10]
        assert all(task.attempts == 1 for task in done.tasks)
        again = await jobs.CreateJob(generation(4, request_id=job.request_id), timeout=CALL_LIMIT_S)
        assert again.name == job.name


async def test_a_stopped_gateway_ends_polls_and_watches_at_once(
    gateway: GatewayProcess, channel: grpc.aio.Channel
) -> None:
    _, painter = await workers_of(channel)
    jobs = jobs_of(channel)
    job = await jobs.CreateJob(generation(1), timeout=CALL_LIMIT_S)
    watching = jobs.WatchJob(gateway_pb2.WatchJobRequest(name=job.name), timeout=CALL_LIMIT_S)
    await watching.read()
    polling = asyncio.ensure_future(painter.lease(wait_s=60.0))
    following = asyncio.ensure_future(watching.read())
    # The first of these may overtake the poll; when the last is answered the gateway has it.
    for _ in range(3):
        await jobs.ListJobs(gateway_pb2.ListJobsRequest(), timeout=CALL_LIMIT_S)
    # Within CALL_LIMIT_S, which is less than the poll's wait and the grace.
    assert await gateway.stop() == 0
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await following
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await polling == []


async def test_errors_carry_their_field_and_the_next_request_works(channel: grpc.aio.Channel) -> None:
    await workers_of(channel)
    jobs = jobs_of(channel)
    wrong = generation(1)
    wrong.generation.controls[0].annotator = "none"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await jobs.CreateJob(wrong, timeout=CALL_LIMIT_S)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(refused.value).field == "generation.controls[0].annotator"
    late = queue_pb2.CompleteTaskRequest(lease_token=b"\xff\x00", outputs=[_some_output()])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await queue_pb2_grpc.QueueServiceStub(channel).CompleteTask(late, timeout=CALL_LIMIT_S)
    assert refused.value.code() is grpc.StatusCode.ABORTED
    assert from_rpc_error(refused.value).reason == "LEASE_LOST"
    assert (await jobs.CreateJob(generation(1), timeout=CALL_LIMIT_S)).name


def _some_output() -> queue_pb2.Output:
    return queue_pb2.Output(blob=common_pb2.Blob(digest="sha256:" + "0" * 64), width_px=8, height_px=8)


async def test_every_service_takes_only_its_own_token(tmp_path: Path) -> None:
    operator, workers = "operator-0123456789", "workers-0123456789"
    gateway = GatewayProcess(tmp_path / "data", FANLIGHT_CLIENT_TOKEN=operator, FANLIGHT_WORKER_TOKEN=workers)
    await gateway.start()
    try:
        async with gateway.channel(operator) as client, gateway.channel(workers) as worker, gateway.channel() as none:
            for channel, list_jobs, lease in ((client, True, False), (worker, False, True), (none, False, False)):
                listing = jobs_of(channel).ListJobs(gateway_pb2.ListJobsRequest(), timeout=CALL_LIMIT_S)
                assert await _let_in(listing) is list_jobs
                assert await _let_in(RpcWorker(channel, "diffusion").lease()) is lease
            health = health_pb2_grpc.HealthStub(none)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=""), timeout=CALL_LIMIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with httpx.AsyncClient() as web:
            assert (await web.get(f"http://{gateway.http}/v1/jobs")).status_code == 401
            header = {"authorization": f"bearer {operator}"}
            assert (await web.get(f"http://{gateway.http}/v1/jobs", headers=header)).status_code == 200
    finally:
        await gateway.stop(signal.SIGKILL)


async def _let_in(call: object) -> bool:
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error.code() is not grpc.StatusCode.UNAUTHENTICATED
    return True
