"""The gateway's client side without a queue: jobs end by themselves, as their prompt says.

A prompt with `fail` in it ends in a failure, one with `forever` never ends, anything else succeeds.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc

from fanlight.blobs.v1.blobs_pb2_grpc import add_BlobServiceServicer_to_server
from fanlight.common.v1.common_pb2 import Blob, Failure, Span
from fanlight.diffusion.v1.diffusion_pb2 import GenerationDefaults, LeftOutModel, Model
from fanlight.errors import FanlightError, NotFound
from fanlight.gateway.v1 import gateway_pb2 as pb
from fanlight.gateway.v1 import gateway_pb2_grpc
from fanlight.preprocessor.v1.preprocessor_pb2 import Annotator, Parameter
from fanlight.queue.v1.queue_pb2 import Worker
from services.gateway.app.tenants import Callers
from services.kernel.config import CommonSettings
from services.kernel.grpc_server import RpcServer
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.principals import blobs_of_clients

IMAGE_BYTES = b"\x89PNG\r\n\x1a\n an image that was requested"
FIRST_SEED = 100


def canny() -> Annotator:
    parameter = Parameter(name="low_threshold", kind=Parameter.KIND_INTEGER, minimum=0, maximum=255)
    parameter.default_value.number_value = 100
    return Annotator(id="canny", description="Edges", parameters=[parameter], controlnets=["canny"])


class FakeJobService(gateway_pb2_grpc.JobServiceServicer):
    def __init__(self) -> None:
        self.jobs: dict[str, pb.Job] = {}
        self.blobs = MemoryBlobs()
        self.annotators = [canny()]
        # Every request as it came, by the method's name.
        self.requests: dict[str, list] = {}
        # Raised by the next calls of a method instead of answering; None lets one pass.
        self.failures: dict[str, deque[FanlightError | None]] = {}
        # After so many events each of the next streams breaks.
        self.breaks: deque[int] = deque()
        # What the gateway and each image's node warn of.
        self.warnings: list[str] = []
        self.image_warnings: list[str] = []
        self.changed = asyncio.Condition()

    def _take(self, method: str, request) -> None:
        self.requests.setdefault(method, []).append(request)
        failures = self.failures.get(method)
        if failures and (failure := failures.popleft()) is not None:
            raise failure

    async def CreateJob(self, request, context):
        self._take("CreateJob", request)
        for job in self.jobs.values():
            if request.request_id and job.request_id == request.request_id:
                return job
        job = pb.Job(name=f"jobs/j{len(self.jobs) + 1}", state=pb.Job.STATE_QUEUED, revision=1)
        job.request_id, job.priority = request.request_id, request.priority
        getattr(job, request.WhichOneof("work")).CopyFrom(getattr(request, request.WhichOneof("work")))
        self.jobs[job.name] = job
        return job

    async def GetJob(self, request, context):
        self._take("GetJob", request)
        return self._job(request.name)

    def _job(self, name: str) -> pb.Job:
        if name not in self.jobs:
            raise NotFound(f"there is no {name}", field="name")
        return self.jobs[name]

    async def ListJobs(self, request, context):
        self._take("ListJobs", request)
        found = [job for job in reversed(self.jobs.values()) if request.state in (0, job.state)]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 50)
        return pb.ListJobsResponse(jobs=found[start:end], next_page_token=str(end) if end < len(found) else "")

    async def ExplainJob(self, request, context):
        self._take("ExplainJob", request)
        self._job(request.name)
        worker = pb.WorkerExplanation(worker="w", verdict="slower", why="it would finish in 9.0 s", finish_s=9.0)
        task = pb.TaskExplanation(task=1, stage="diffusion", why="v should begin it in 2.0 s", workers=[worker])
        estimate = pb.JobEstimate(ready_s=7.0, fetch_bytes=150_000_000, node="home", link_bps=100e6)
        return pb.JobExplanation(name=request.name, summary="task 1 waits", estimate=estimate, tasks=[task])

    async def CancelJob(self, request, context):
        self._take("CancelJob", request)
        job = self._job(request.name)
        job.state, job.revision = pb.Job.STATE_CANCELLED, job.revision + 1
        async with self.changed:
            self.changed.notify_all()
        return job

    async def WatchJob(self, request, context):
        self._take("WatchJob", request)
        limit = self.breaks.popleft() if self.breaks else 1_000
        count = 0
        async for event in self._life(self._job(request.name), request.after_revision):
            if count == limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream broke")
            count += 1
            yield event

    async def _life(self, job: pb.Job, after_revision: int) -> AsyncIterator[pb.JobEvent]:
        if job.revision > after_revision and job.state != pb.Job.STATE_QUEUED:
            yield pb.JobEvent(job=job)
        if job.state == pb.Job.STATE_QUEUED:
            job.state, job.revision = pb.Job.STATE_RUNNING, 2
            yield pb.JobEvent(job=job)
        while job.state == pb.Job.STATE_RUNNING:
            yield pb.JobEvent(progress=pb.TaskProgress(task=1, step=1, steps=2))
            if "forever" in job.generation.prompt:
                async with self.changed:
                    await self.changed.wait()
            else:
                self._end(job)
            yield pb.JobEvent(job=job)

    def _end(self, job: pb.Job) -> None:
        job.revision += 1
        if "fail" in job.generation.prompt:
            job.state = pb.Job.STATE_FAILED
            job.failure.CopyFrom(Failure(reason="INVALID_FIELD", message="is too odd", field="generation.prompt"))
            return
        job.state = pb.Job.STATE_SUCCEEDED
        job.warnings.extend(self.warnings)
        info = self.blobs.put(IMAGE_BYTES)
        first = job.generation.seed or FIRST_SEED
        for index in range(job.generation.count or 1):
            blob = Blob(scope=info.scope, digest=info.digest, size_bytes=info.size_bytes, media_type="image/png")
            image = job.images.add(blob=blob, width_px=64, height_px=64, task=index + 1)
            image.warnings.extend(self.image_warnings)
            if job.HasField("generation"):
                image.seed = first + index
            spans = [Span(name="denoise", duration_s=0.5), Span(name="load", duration_s=0.25)]
            task = job.tasks.add(number=index + 1, stage="diffusion", state=pb.Task.STATE_SUCCEEDED, spans=spans)
            task.queue_time.seconds, task.lease_time.seconds, task.end_time.seconds = 1000, 1002, 1005

    async def ListDeadLetters(self, request, context):
        self._take("ListDeadLetters", request)
        return pb.ListDeadLettersResponse(letters=[dead_letter()])

    async def GetDeadLetter(self, request, context):
        self._take("GetDeadLetter", request)
        return dead_letter()

    async def RedriveDeadLetter(self, request, context):
        self._take("RedriveDeadLetter", request)
        return self._job("/".join(request.task.split("/")[:2]))

    async def GetWebhook(self, request, context):
        self._take("GetWebhook", request)
        tries = [pb.WebhookTry(status=500), pb.WebhookTry(error="no answer within 15 s")]
        return pb.Webhook(job=request.name, url="https://example.com/h", state=pb.Webhook.STATE_PENDING, tries=tries)

    async def ListAnnotators(self, request, context):
        self._take("ListAnnotators", request)
        return pb.ListAnnotatorsResponse(annotators=self.annotators)

    async def ListModels(self, request, context):
        self._take("ListModels", request)
        model = Model(id="starter", kind="checkpoint", is_default=True, size_bytes=13_000_000, width_px=64)
        model.defaults.MergeFrom(
            GenerationDefaults(steps=4, guidance_scale=1.5, scheduler="lcm", variant="lcm", sources=["lcm by name"])
        )
        left_out = [LeftOutModel(path="Lora/old.ckpt", reason="it is a pickle", nodes=["here"])]
        return pb.ListModelsResponse(models=[model], left_out=left_out if request.left_out else [])

    async def ListWorkers(self, request, context):
        self._take("ListWorkers", request)
        workers = [
            pb.WorkerStatus(worker=Worker(id=f"w-{stage}", node="here", stage=stage, slots=2), live=True)
            for stage in ("preprocess", "diffusion")
        ]
        avoided = workers[1].avoided.add(need="embedding:oldstyle", why="2 jobs failed there by it")
        avoided.until_time.FromSeconds(1_800_000_000)
        return pb.ListWorkersResponse(workers=workers)


def dead_letter() -> pb.DeadLetter:
    failure = Failure(reason="NODE_FAULT", message="out of memory")
    attempts = [pb.Attempt(node="n1", worker="n1-diffusion-1", failure=failure), pb.Attempt(node="n2", worker="w2")]
    return pb.DeadLetter(task="jobs/j1/tasks/2", stage="diffusion", tenant="acme", failure=failure, attempts=attempts)


@asynccontextmanager
async def serving(service: FakeJobService, *, address: str = "127.0.0.1:0", token: str = "") -> AsyncIterator[str]:
    """The address it answers at."""
    services = {
        "fanlight.gateway.v1.JobService": lambda s: gateway_pb2_grpc.add_JobServiceServicer_to_server(service, s),
        "fanlight.blobs.v1.BlobService": lambda s: add_BlobServiceServicer_to_server(
            blobs_of_clients(service.blobs, Callers()), s
        ),
    }
    server = RpcServer(
        CommonSettings(drain_grace_s=0),
        services=services,
        tokens={},
        default_tokens=(token,) if token else (),
    )
    port = server.bind(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()


@contextmanager
def serving_beside(service: FakeJobService, *, token: str = "") -> Iterator[str]:
    """The same on a thread of its own, for callers that block."""
    started = threading.Event()
    address = ""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        nonlocal address
        async with serving(service, token=token) as address:
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
