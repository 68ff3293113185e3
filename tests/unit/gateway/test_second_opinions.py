"""One worker's word that the request is at fault ends no job while another node can be asked, once."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from fanlight.diffusion.v1 import diffusion_pb2
from services.gateway.app.second_opinions import OPINION_WAIT_S
from services.gateway.domain.job import DIFFUSION, Failure, Fault, Job, JobState, StageRequest, Task, TaskState
from services.gateway.wire import answers
from services.gateway.wire.stages import confirms
from tests.fakes.fleet import CRASH, STARTER, Fleet, FleetWorker, generation

WRONG = Failure(reason="INVALID_FIELD", message="I do not like it", field="prompt")


async def nodes(fleet: Fleet, *names: str) -> list[FleetWorker]:
    found = [fleet.worker(DIFFUSION, name) for name in names]
    for each in found:
        await each.come()
    return found


async def refused(fleet: Fleet, worker: FleetWorker, count: int = 1) -> Job:
    job = await fleet.gateway.jobs.create(generation(count))
    (task,) = await worker.lease()
    await worker.fail(task, Fault.REQUEST, WRONG)
    return await fleet.get(job)


async def test_another_node_is_asked_and_its_success_counts(fleet: Fleet) -> None:
    first, second = await nodes(fleet, "a", "b")
    job = await refused(fleet, first)
    assert (job.state, job.tasks[0].attempts[0].refused) == (JobState.QUEUED, True)
    assert await first.lease() == []
    assert await second.work() == 1
    assert (await fleet.get(job)).state is JobState.SUCCEEDED
    assert answers.job(await fleet.get(job)).tasks[0].failed_attempts[0].refused


async def test_two_nodes_that_say_so_end_the_job(fleet: Fleet) -> None:
    first, second, _ = await nodes(fleet, "a", "b", "c")
    job = await refused(fleet, first)
    (task,) = await second.lease()
    await second.fail(task, Fault.REQUEST, WRONG)
    ended = await fleet.get(job)
    assert (ended.state, ended.failure.field) == (JobState.FAILED, "generation.prompt")
    assert not ended.tasks[0].dead, "there is nothing to redrive"


async def test_where_no_other_node_can_do_it_the_job_ends_at_once(fleet: Fleet) -> None:
    (alone,) = await nodes(fleet, "a")
    elsewhere = fleet.worker(DIFFUSION, "z", node="a")
    await elsewhere.come()
    assert (await refused(fleet, alone)).state is JobState.FAILED


@pytest.mark.parametrize(("size_bytes", "state"), [(6 * 10**9, JobState.FAILED), (10**8, JobState.QUEUED)])
async def test_a_node_that_would_download_for_longer_than_is_waited_is_not_asked(
    fleet: Fleet, size_bytes: int, state: JobState
) -> None:
    (first,) = await nodes(fleet, "a")
    empty = fleet.worker(DIFFUSION, "b", models=(replace(STARTER, size_bytes=size_bytes),))
    empty.disk = frozenset()
    await empty.come()
    assert (await refused(fleet, first)).state is state


async def test_a_node_whose_claims_were_wrong_gets_such_tasks_last(fleet: Fleet) -> None:
    first, second = await nodes(fleet, "a", "b")
    for _ in range(2):
        await refused(fleet, first)
        assert await second.work() == 1
        await first.come()
    (avoided,) = fleet.gateway.workers.avoidances_of(first.worker.id)
    assert (avoided.need, "REQUEST_FAULT_DISPROVED" in avoided.why) == ("checkpoint:starter", True)
    await fleet.gateway.jobs.create(generation())
    assert await first.lease() == []
    assert await second.work() == 1


async def test_wrong_claims_about_many_images_of_one_job_count_once(fleet: Fleet) -> None:
    first, second = await nodes(fleet, "a", "b")
    job = await fleet.gateway.jobs.create(generation(4))
    tasks = await first.lease(limit=8)
    for task in tasks:
        await first.fail(task, Fault.REQUEST, WRONG)
    assert await second.work() >= len(tasks) > 1
    assert (await fleet.get(job)).state is JobState.SUCCEEDED
    assert not fleet.gateway.workers.avoidances_of(first.worker.id)
    (record,) = await fleet.store.list("faults", limit=9)
    assert b'"count":1' in record.value


async def test_when_the_other_node_leaves_the_first_one_is_asked_again_and_then_believed(fleet: Fleet) -> None:
    first, second = await nodes(fleet, "a", "b")
    job = await refused(fleet, first)
    second.worker = replace(second.worker, draining=True)
    await second.come()
    (task,) = await first.lease()
    await first.fail(task, Fault.REQUEST, WRONG)
    assert (await fleet.get(job)).state is JobState.FAILED


async def test_a_node_that_breaks_on_it_gives_no_opinion(fleet: Fleet) -> None:
    first, second, third = await nodes(fleet, "a", "b", "c")
    job = await refused(fleet, first)
    (task,) = await second.lease()
    await second.fail(task, Fault.NODE, CRASH)
    fleet.rest(10.0)
    assert (await fleet.get(job)).state is JobState.QUEUED
    assert await third.work() == 1
    assert (await fleet.get(job)).state is JobState.SUCCEEDED


async def test_an_opinion_that_does_not_come_in_time_is_not_waited_for(fleet: Fleet) -> None:
    first, _ = await nodes(fleet, "a", "b")
    job = await refused(fleet, first)
    fleet.clock.advance(OPINION_WAIT_S - 1)
    await fleet.gateway.queue.end_unconfirmed()
    assert (await fleet.get(job)).state is JobState.QUEUED
    fleet.clock.advance(1.0)
    await fleet.gateway.queue.end_unconfirmed()
    ended = await fleet.get(job)
    assert (ended.state, ended.failure.message) == (JobState.FAILED, WRONG.message)


async def test_a_restarted_gateway_asks_the_other_node_too(fleet: Fleet) -> None:
    first, second = await nodes(fleet, "a", "b")
    job = await refused(fleet, first)
    async with fleet.restarted().running() as again:
        first.fleet = second.fleet = again
        await second.come()
        await first.come()
        assert await first.lease() == []
        (task,) = await second.lease()
        await second.fail(task, Fault.REQUEST, WRONG)
        assert (await again.get(job)).state is JobState.FAILED


async def test_the_explanation_says_who_is_asked(fleet: Fleet) -> None:
    first, _ = await nodes(fleet, "a", "b")
    job = await refused(fleet, first)
    summary = fleet.gateway.explanations.of(job).summary
    assert "a says that the request is at fault, and another node is asked" in summary
    assert "b-diffusion should begin it" in summary


async def test_what_the_gateway_finds_itself_needs_no_second_opinion(fleet: Fleet) -> None:
    first, _ = await nodes(fleet, "a", "b")
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await first.lease()
    asked: list[Failure] = []

    def agrees(job: Job, task: Task, failure: Failure) -> bool:
        asked.append(failure)
        return True

    await fleet.gateway.queue.end_attempt(task.token, Fault.REQUEST, WRONG, agrees)
    assert (await fleet.get(job)).state is JobState.FAILED
    assert asked == [WRONG], "with the field as the worker's request names it"


def wrong(request: diffusion_pb2.GenerateRequest) -> None:
    request.steps = 1_000_000


@pytest.mark.parametrize(
    ("change", "field", "is_confirmed"),
    [(wrong, "steps", True), (wrong, "prompt", False), (lambda request: None, "steps", False), (wrong, "", False)],
)
def test_the_gateway_confirms_what_its_contract_refuses(
    change: Callable[[diffusion_pb2.GenerateRequest], None], field: str, is_confirmed: bool
) -> None:
    request = diffusion_pb2.GenerateRequest(model="starter", prompt="a fox", steps=4)
    change(request)
    asked = StageRequest(stage=DIFFUSION, field="generation", message=request.SerializeToString())
    task = Task(number=1, stage=DIFFUSION, request=0, state=TaskState.LEASED)
    job = Job(
        id="j", state=JobState.RUNNING, create_time_s=1.0, priority=0, request_id="", requests=(asked,), tasks=(task,)
    )
    failure = Failure(reason="INVALID_FIELD", message="is too large", field=field)
    assert confirms(job, task, failure) is is_confirmed
