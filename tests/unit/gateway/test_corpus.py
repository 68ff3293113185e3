"""The corpus at the gateway: over gRPC and HTTP the contract's answer, with the client's field, before a job exists."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import grpc.aio
import httpx
import pytest
from google.protobuf import json_format

from fanlight.channel import open_channel
from fanlight.contract import annotation, generation
from fanlight.contract.generation import PIPELINES, PRECISIONS, SAFETY_MODES
from fanlight.contract.parameters import Parameter
from fanlight.contract.schedulers import SCHEDULERS
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import FanlightError
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.workers import AnnouncedModel
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.corpus import CORPUS, Case, Request
from tests.fakes.fleet import CANNY, STARTER, STARTER_CANNY, YOUNG, Fleet
from tests.fakes.gateway_process import jobs_of
from tests.fakes.rpc_gateway import serving

MODELS = (
    replace(STARTER, pipelines=PIPELINES),
    STARTER_CANNY,
    AnnouncedModel(id="inpaint", kind="controlnet", family="starter"),
    AnnouncedModel(id="cyanotype", kind="lora", family="starter"),
    AnnouncedModel(id="mint", kind="embedding", family="starter"),
)
OFFERS = (
    *(f"scheduler:{name}" for name in SCHEDULERS),
    *(f"safety_checker:{mode}" for mode in SAFETY_MODES),
    *(f"precision:{precision}" for precision in PRECISIONS),
    *YOUNG,
    "prompt_syntax:a1111",
)
EDGES = replace(
    CANNY,
    parameters=(
        Parameter(name="low_threshold", default=100, minimum=0, maximum=255),
        Parameter(name="mode", default=""),
    ),
)
STATUS = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 413}
# What even this worker lacks, by the case's name.
LACKING = {"an unknown model": "generation.model", "65 x 64": "generation.width_px"}

REFUSED = [case for case in CORPUS if case.expected is not None]
TAKEN = [case for case in CORPUS if case.expected is None]
# Code, field and message; None where it was accepted.
Answer = tuple[str, str, str] | None
Ask = Callable[[Request], Awaitable[Answer]]


def prefix_of(request: Request) -> str:
    return "generation" if isinstance(request, GenerateRequest) else "annotation"


def contracts_answer(request: Request) -> Answer:
    try:
        if isinstance(request, GenerateRequest):
            generation.check(request)
        else:
            annotation.check(request)
    except FanlightError as error:
        return error.code, f"{prefix_of(request)}.{error.field}", error.message
    return None


def job_of(request: Request) -> gateway_pb2.CreateJobRequest:
    return gateway_pb2.CreateJobRequest(**{prefix_of(request): request})


@pytest.fixture
async def able(fleet: Fleet) -> Fleet:
    """With workers that can do all that there is."""
    await fleet.worker(PREPROCESS, annotators=(EDGES,)).come()
    await fleet.worker(DIFFUSION, models=MODELS, other_offers=tuple(sorted(OFFERS))).come()
    return fleet


@pytest.fixture
async def over_grpc(able: Fleet) -> AsyncIterator[Ask]:
    async with serving(able) as address, open_channel(address) as channel:

        async def ask(request: Request) -> Answer:
            try:
                await jobs_of(channel).CreateJob(job_of(request))
            except grpc.aio.AioRpcError as error:
                error_shown = from_rpc_error(error)
                return error.code().name, error_shown.field, error_shown.message
            return None

        yield ask


@pytest.fixture
async def over_http(able: Fleet) -> AsyncIterator[Ask]:
    app = http_app(able.gateway, able.blobs, HttpOptions())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:

        async def ask(request: Request) -> Answer:
            body = json_format.MessageToDict(job_of(request), preserving_proto_field_name=True)
            response = await client.post("/v1/jobs", json=body)
            if response.status_code == 201:
                return None
            error = response.json()["error"]
            code = next(code for code, status in STATUS.items() if status == response.status_code)
            return code, error.get("field", ""), error["message"]

        yield ask


def can_be_json(case: Case) -> bool:
    """A parameter that is not a number has no JSON."""
    try:
        json.dumps(json_format.MessageToDict(case.build()), allow_nan=False)
    except (json_format.SerializeToJsonError, ValueError):
        return False
    return True


async def test_what_no_worker_could_do_is_refused_in_the_contracts_words(able: Fleet, over_grpc: Ask) -> None:
    for case in REFUSED:
        request = case.build()
        answer = await over_grpc(request)
        assert answer == contracts_answer(request), case.name
        code, field, part = case.expected
        assert answer is not None
        assert (answer[0], answer[1]) == (code, f"{prefix_of(request)}.{field}"), case.name
        assert part in answer[2], case.name
    assert list(able.gateway._core.job_store.open_jobs) == []


async def test_over_http_it_is_refused_in_the_same_words(able: Fleet, over_http: Ask) -> None:
    cases = [case for case in REFUSED if can_be_json(case)]
    assert len(REFUSED) - len(cases) == 2, "all but the parameters of nan"
    for case in cases:
        assert await over_http(case.build()) == contracts_answer(case.build()), case.name
    assert list(able.gateway._core.job_store.open_jobs) == []


@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_what_a_worker_can_do_is_accepted(door: str, over_grpc: Ask, over_http: Ask, able: Fleet) -> None:
    ask = {"grpc": over_grpc, "http": over_http}[door]
    for case in TAKEN:
        answer = await ask(case.build())
        assert (answer and answer[1]) == LACKING.get(case.name), (case.name, answer)
        assert answer is None or case.depends_on_worker, case.name
    assert len(list(able.gateway._core.job_store.open_jobs)) == len(TAKEN) - len(LACKING)


async def test_what_is_accepted_can_be_done(able: Fleet, over_grpc: Ask) -> None:
    """Every task of it is leased by some worker: nothing waits for one that is not there."""
    for case in TAKEN:
        await over_grpc(case.build())
    annotator = able.worker(PREPROCESS, annotators=(EDGES,))
    painter = able.worker(DIFFUSION, models=MODELS, other_offers=tuple(sorted(OFFERS)))
    async with asyncio.timeout(30):
        while await annotator.work() + await painter.work():
            pass
    assert list(able.gateway._core.job_store.open_jobs) == []
