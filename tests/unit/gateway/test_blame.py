"""What a node lacks is its own fault: the task is retried on another, and no circuit breaker opens."""

from dataclasses import replace

import pytest

from fanlight.errors import FailedPrecondition, NotFound, ResultRefused, TooLarge
from services.gateway.app.completion import as_clients_field
from services.gateway.domain import plan
from services.gateway.domain.blame import NOT_HERE
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Failure, Fault, JobState
from services.gateway.domain.machine import FAILURES_LIMIT
from services.gateway.domain.workers import AnnouncedModel
from tests.fakes.fleet import CRASH, STARTER, Fleet, FleetWorker, annotation, control, generation, plan_of

LACKING = [
    Failure(reason=NotFound.reason, message="there is no file of the VAE", field="vae"),
    Failure(reason=FailedPrecondition.reason, message="no safety checker here", field="safety_checker"),
    Failure(reason=TooLarge.reason, message="needs 20 GB of 12", field="width_px"),
    Failure(reason=ResultRefused.reason, message="the gateway refused the result", field="provenance_json"),
]


def test_what_a_node_may_lack_is_known_by_its_reason() -> None:
    assert {failure.reason for failure in LACKING} == NOT_HERE
    assert CRASH.reason not in NOT_HERE


@pytest.mark.parametrize("failure", LACKING, ids=[each.reason for each in LACKING])
async def test_what_one_node_lacks_is_retried_on_another(fleet: Fleet, failure: Failure) -> None:
    poor, rich = fleet.worker(DIFFUSION, "poor"), fleet.worker(DIFFUSION, "rich")
    await poor.come()
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await poor.lease()
    await poor.fail(task, Fault.NODE, failure)
    kept = await fleet.get(job)
    assert kept.state is JobState.QUEUED
    assert kept.tasks[0].failure.field == f"generation.{failure.field}"
    await rich.come()
    fleet.clock.advance(10.0)
    fleet.gateway._core.queue_index.release_due()
    await rich.come()
    assert await poor.lease() == [], "not again while another live one can"
    assert await rich.work() == 1
    assert (await fleet.get(job)).state is JobState.SUCCEEDED


async def left_out(fleet: Fleet, failure: Failure) -> bool:
    """Whether a node gets no more of a checkpoint, while another can do it, after it has failed so with two jobs."""
    node, other = fleet.worker(DIFFUSION, "node"), fleet.worker(DIFFUSION, "other")
    await node.come()
    await other.come()
    for _ in range(2):
        job = await fleet.gateway.jobs.create(generation())
        (task,) = await node.lease()
        await node.fail(task, Fault.NODE, failure)
        await fleet.gateway.jobs.cancel(job.name)
    await fleet.gateway.jobs.create(generation())
    return await node.lease() == []


@pytest.mark.parametrize("failure", LACKING, ids=[each.reason for each in LACKING])
async def test_a_node_that_lacks_what_one_request_needs_opens_no_circuit_breaker(
    fleet: Fleet, failure: Failure
) -> None:
    assert not await left_out(fleet, failure)


async def test_a_node_that_breaks_does(fleet: Fleet) -> None:
    assert await left_out(fleet, CRASH)


async def failed_much(fleet: Fleet, worker: FleetWorker, failure: Failure) -> None:
    """It fails all of ten jobs that it gets, each for another checkpoint, so that no circuit breaker opens."""
    for number in range(10):
        await worker.come()
        job = await fleet.gateway.jobs.create(generation(model=f"m{number}"))
        for task in await worker.lease():
            await worker.fail(task, Fault.NODE, failure)
        await fleet.gateway.jobs.cancel(job.name)


MODELS = tuple(AnnouncedModel(id=f"m{number}", kind="checkpoint") for number in range(10))


async def judged_beside(fleet: Fleet, failure: Failure, *others: FleetWorker) -> str:
    """Why a worker that fails so is set aside, while these others work."""
    node = fleet.worker(DIFFUSION, "node", models=(*MODELS, STARTER))
    for other in others:
        await other.come()
        done = annotation(other.worker.id) if other.worker.stage == PREPROCESS else generation()
        await fleet.gateway.jobs.create(done)
        assert await other.work() == 1
    await failed_much(fleet, node, failure)
    return fleet.gateway.workers.draining_reason(node.worker.id)


@pytest.mark.parametrize("failure", LACKING, ids=[each.reason for each in LACKING])
async def test_a_node_that_lacks_what_requests_need_is_no_straggler(fleet: Fleet, failure: Failure) -> None:
    assert await judged_beside(fleet, failure, fleet.worker(DIFFUSION, "other", models=(STARTER,))) == ""


async def test_a_node_that_fails_all_is_set_aside_while_its_stage_has_another(fleet: Fleet) -> None:
    other = fleet.worker(DIFFUSION, "other", models=(STARTER,))
    assert "failed by its own fault" in await judged_beside(fleet, CRASH, other)
    fleet.clock.advance(120.0)
    assert fleet.gateway.workers.draining_reason("node-diffusion") == "", "the other one is away"
    await other.come()
    assert fleet.gateway.workers.draining_reason("node-diffusion")
    other.worker = replace(other.worker, draining=True)
    await other.come()
    assert fleet.gateway.workers.draining_reason("node-diffusion") == "", "the other one is leaving"


async def test_the_only_live_worker_of_a_stage_is_never_set_aside(fleet: Fleet) -> None:
    assert await judged_beside(fleet, CRASH, fleet.worker(PREPROCESS, "other")) == ""


async def test_workers_of_another_stage_do_not_raise_how_many_may_be_set_aside(fleet: Fleet) -> None:
    others = [fleet.worker(PREPROCESS, f"p{number}") for number in range(20)]
    two = [fleet.worker(DIFFUSION, f"d{number}", models=(*MODELS, STARTER)) for number in range(2)]
    assert await judged_beside(fleet, CRASH, *others, *two)
    await failed_much(fleet, two[0], CRASH)
    assert fleet.gateway.workers.draining_reason(two[0].worker.id) == "", "a fifth of three diffusion workers is one"


async def test_what_all_nodes_lack_ends_the_job_with_the_last_reason(fleet: Fleet) -> None:
    job = await fleet.gateway.jobs.create(generation())
    for number in range(FAILURES_LIMIT):
        node = fleet.worker(DIFFUSION, f"node-{number}")
        await node.come()
        (task,) = await node.lease()
        await node.fail(task, Fault.NODE, LACKING[0])
        fleet.rest()
    done = await fleet.get(job)
    assert (done.state, done.failure.reason, done.failure.field) == (JobState.FAILED, "NOT_FOUND", "generation.vae")
    assert done.tasks[0].failed_nodes == {"node-0", "node-1", "node-2"}


IN_A_GENERATION = plan_of(generation(2, control(), control(name="other")))
IN_AN_ANNOTATION = plan_of(annotation())


@pytest.mark.parametrize(
    ("of", "number", "field", "clients"),
    [
        (IN_AN_ANNOTATION, 1, "parameters.low", "annotation.parameters.low"),
        (IN_AN_ANNOTATION, 1, "image.data", "annotation.image.data"),
        (IN_A_GENERATION, 1, "parameters.low", "generation.controls[0].parameters.low"),
        (IN_A_GENERATION, 2, "annotator", "generation.controls[1].annotator"),
        (IN_A_GENERATION, 2, "image", "generation.controls[1].image"),
        (IN_A_GENERATION, 1, "image.data", "generation.controls[0].image.data"),
        (IN_A_GENERATION, 3, "controls[0].image", "generation.controls[0].image"),
        (IN_A_GENERATION, 4, "model", "generation.model"),
        (IN_A_GENERATION, 4, "", ""),
    ],
)
def test_a_fields_name_is_the_clients(of: plan.JobPlan, number: int, field: str, clients: str) -> None:
    job = plan.create(of, job_id="j", request_id="", priority=0, now_s=1.0)
    failure = Failure(reason="INVALID_FIELD", message="is wrong", field=field)
    assert as_clients_field(failure, job, number).field == clients
