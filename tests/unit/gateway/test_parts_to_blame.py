"""What is named is to blame: not the node, not the checkpoint, and nobody twice for one job."""

from dataclasses import replace
from typing import Any

import pytest

from fanlight.diffusion.v1 import diffusion_pb2
from services.gateway.app.tenants import Caller
from services.gateway.domain.job import DIFFUSION, Failure, Fault, Job
from services.gateway.domain.machine import FAILURES_LIMIT
from services.gateway.domain.workers import AnnouncedModel
from services.gateway.scheduler.explain import Verdict
from services.gateway.wire import answers
from tests.fakes.fleet import (
    CRASH,
    OTHER,
    STARTER,
    STARTER_CANNY,
    AbleFleet,
    Fleet,
    FleetWorker,
    generation,
    photo,
)

MODELS = tuple(AnnouncedModel(id="old", kind=kind, family="starter") for kind in ("embedding", "lora", "vae"))
OFFERS = (STARTER, OTHER, STARTER_CANNY, *MODELS)
# How a request names each of them.
REQUESTS: dict[str, dict[str, Any]] = {
    "embedding:old": {"embeddings": ["old"]},
    "lora:old": {"prompt": "a fox <lora:old:1>"},
    "vae:old": {"vae": "old"},
    "controlnet:canny": {"controls": [diffusion_pb2.Control(image=photo(), controlnet="canny")]},
}
PARTS = pytest.mark.parametrize("part", REQUESTS)


def broken(part: str, reason: str = "NODE_FAULT") -> Failure:
    return Failure(reason=reason, message="is damaged", part=part)


def using(part: str, count: int = 1) -> Any:
    given = dict(REQUESTS[part])
    return generation(count, *given.pop("controls", ()), workers=AbleFleet(OFFERS), **given)


async def a_node(fleet: Fleet, name: str = "node", device: str = "") -> FleetWorker:
    worker = fleet.worker(DIFFUSION, name, models=OFFERS)
    worker.worker = replace(worker.worker, device=device)
    await worker.come()
    return worker


async def fail_all(worker: FleetWorker, failure: Failure, fault: Fault = Fault.NODE) -> int:
    tasks = await worker.lease(limit=16)
    worker.fleet.clock.advance(1.0)
    for task in tasks:
        await worker.fail(task, fault, failure)
    return len(tasks)


async def fail_jobs(fleet: Fleet, worker: FleetWorker, part: str, jobs: int = 2, count: int = 1) -> None:
    for _ in range(jobs):
        job = await fleet.gateway.jobs.create(using(part, count))
        assert await fail_all(worker, broken(part)) >= min(count, 2)
        await fleet.gateway.jobs.cancel(job.name)


def needs_avoided(worker: FleetWorker) -> list[str]:
    return [each.need for each in worker.fleet.gateway.workers.avoidances_of(worker.worker.id)]


@PARTS
async def test_what_is_broken_on_a_node_goes_to_another_and_all_else_stays(fleet: Fleet, part: str) -> None:
    node = await a_node(fleet)
    await fail_jobs(fleet, node, part)
    sound = await a_node(fleet, "sound")
    assert needs_avoided(node) == [part]
    await fleet.gateway.jobs.create(using(part))
    assert await node.lease() == [], "another node can do it"
    assert len(await sound.lease()) == 1
    await fleet.gateway.jobs.create(generation(prompt="the same checkpoint"))
    assert len(await node.lease()) == 1


@PARTS
async def test_the_last_node_that_offers_what_is_broken_there_still_gets_it(fleet: Fleet, part: str) -> None:
    node = await a_node(fleet)
    other = fleet.worker(DIFFUSION, "without", models=(STARTER, OTHER))
    await other.come()
    await fail_jobs(fleet, node, part)
    await fleet.gateway.jobs.create(using(part))
    assert len(await node.lease()) == 1


async def test_twelve_images_of_one_job_count_once(fleet: Fleet) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "sound")
    await fail_jobs(fleet, node, "embedding:old", jobs=1, count=12)
    assert needs_avoided(node) == []
    await fail_jobs(fleet, node, "embedding:old", jobs=1, count=12)
    assert needs_avoided(node) == ["embedding:old"]


async def test_twelve_images_that_fail_without_a_named_part_count_once_and_make_no_straggler(fleet: Fleet) -> None:
    node, sound = await a_node(fleet), await a_node(fleet, "sound")
    await fleet.gateway.jobs.create(generation(workers=AbleFleet(OFFERS)))
    fleet.clock.advance(1.0)
    assert await sound.work() + await node.work() == 1
    job = await fleet.gateway.jobs.create(generation(12))
    tasks = [*await node.lease(limit=16), *await sound.lease(limit=16)]
    for task in tasks:
        await node.fleet.gateway.queue.fail(task.token, Fault.NODE, CRASH)
    await fleet.gateway.jobs.cancel(job.name)
    assert needs_avoided(node) == needs_avoided(sound) == []
    assert not any(each.draining_reason for each in fleet.gateway.workers.statuses())


async def test_a_batch_of_several_jobs_that_fails_counts_once_and_each_is_tried_alone(fleet: Fleet) -> None:
    node = await a_node(fleet)
    jobs = [await fleet.gateway.jobs.create(generation()) for _ in range(3)]
    assert await fail_all(node, CRASH) == 3
    assert needs_avoided(node) == []
    fleet.rest(5.0)
    for _ in jobs:
        (task,) = await node.lease(limit=16)
        assert task.task.alone
        await node.complete(task)


async def test_tasks_that_ran_at_the_same_time_count_once_whenever_they_were_leased(fleet: Fleet) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "sound")
    tasks = []
    for _ in range(8):
        await fleet.gateway.jobs.create(generation())
        tasks += await node.lease()
    fleet.clock.advance(1.0)
    assert len(tasks) > 2
    for task in tasks:
        await node.fail(task, Fault.NODE, CRASH)
        fleet.clock.advance(0.1)
    assert needs_avoided(node) == []
    alone = [(await fleet.get(task.job)).tasks[0].alone for task in tasks]
    assert alone == [True] * (len(tasks) - 1) + [False], "the last one had nobody beside it"


async def test_jobs_of_several_tenants_that_fail_by_one_part_all_count(fleet: Fleet) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "sound")
    failed = 0
    for tenant in ("acme", "globex", "initech"):
        job = await fleet.gateway.jobs.create(using("vae:old"), Caller(tenant=tenant))
        failed += await fail_all(node, broken("vae:old"))
        await fleet.gateway.jobs.cancel(job.name)
    assert (failed, needs_avoided(node)) == (2, ["vae:old"]), "the third tenant's went to another node"
    assert fleet.gateway.workers.draining_reason(node.worker.id) == ""


@pytest.mark.parametrize(
    "part", ["lora:other", "checkpoint:other", "source:hub", "scheduler:ddim", "nonsense", "x" * 2000]
)
async def test_a_part_that_the_task_does_not_use_is_not_believed(fleet: Fleet, part: str) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "sound")
    for _ in range(2):
        job = await fleet.gateway.jobs.create(using("embedding:old"))
        assert await fail_all(node, broken(part)) == 1
        assert (await fleet.get(job)).tasks[0].attempts[-1].failure == broken("")
        await fleet.gateway.jobs.cancel(job.name)
    assert needs_avoided(node) == ["checkpoint:starter"], "it counts as a failure of the node"


async def test_a_broken_device_counts_for_its_whole_stage_and_for_no_other_device_of_the_node(fleet: Fleet) -> None:
    node, beside, _ = await a_node(fleet, device="cuda"), await a_node(fleet, "z", "cpu"), await a_node(fleet, "z2")
    beside.worker = replace(beside.worker, node="node")
    await beside.come()
    for _ in range(2):
        job = await fleet.gateway.jobs.create(generation())
        assert await fail_all(node, broken("device:cuda")) == 1
        await fleet.gateway.jobs.cancel(job.name)
    assert needs_avoided(node) == ["stage:diffusion"]
    assert needs_avoided(beside) == []
    await fleet.gateway.jobs.create(generation(model="other"))
    assert await node.lease() == []
    assert len(await beside.lease()) == 1


@PARTS
async def test_a_success_with_it_takes_a_failure_back(fleet: Fleet, part: str) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "sound")
    await fail_jobs(fleet, node, part, jobs=1)
    await fleet.gateway.jobs.create(using(part))
    assert await node.work() == 1
    await fail_jobs(fleet, node, part, jobs=1)
    assert needs_avoided(node) == []


async def test_a_restarted_gateway_still_knows_what_is_broken_where(fleet: Fleet) -> None:
    node, sound = await a_node(fleet), await a_node(fleet, "sound")
    await fail_jobs(fleet, node, "embedding:old")
    async with fleet.restarted().running() as again:
        node.fleet = sound.fleet = again
        await sound.come()
        await node.come()
        await again.gateway.jobs.create(using("embedding:old"))
        assert await node.lease() == []
        assert len(await sound.lease()) == 1


async def test_the_list_of_workers_and_the_explanation_say_why_and_until_when(fleet: Fleet) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "sound")
    await fail_jobs(fleet, node, "embedding:old")
    await node.come()
    statuses = {each.worker.node: answers.worker_status(each) for each in fleet.gateway.workers.statuses()}
    (avoided,) = statuses["node"].avoided
    assert (avoided.need, avoided.until_time.seconds) == ("embedding:old", int(fleet.clock.now_s()) + 60)
    assert avoided.why == "2 jobs failed there by it without a success, the last one with NODE_FAULT"
    assert not statuses["sound"].avoided
    assert not statuses["node"].draining
    job = await fleet.gateway.jobs.create(using("embedding:old"))
    (task,) = fleet.gateway.explanations.of(await fleet.get(job)).tasks
    found = {each.node: each for each in task.workers}
    assert found["sound"].verdict is Verdict.PLANNED
    assert found["node"].verdict is Verdict.AVOIDED
    assert "embedding:old: 2 jobs failed there" in found["node"].why
    assert "for 60 s more" in found["node"].why


async def test_tasks_that_were_planned_for_a_node_leave_it_when_its_circuit_breaker_opens(fleet: Fleet) -> None:
    node = await a_node(fleet)
    await fail_jobs(fleet, node, "lora:old", jobs=1)
    waiting: list[Job] = [await fleet.gateway.jobs.create(using("lora:old")) for _ in range(3)]
    (task,) = await node.lease()
    await node.fail(task, Fault.NODE, broken("lora:old"))
    sound = await a_node(fleet, "sound")
    assert await node.lease(limit=8) == []
    fleet.rest(20.0)
    await sound.come()
    assert await sound.work() == len(waiting)


async def test_a_straggler_that_alone_offers_a_checkpoint_still_gets_its_tasks(fleet: Fleet) -> None:
    many = tuple(AnnouncedModel(id=f"m{number}", kind="checkpoint") for number in range(10))
    node = fleet.worker(DIFFUSION, "node", models=(*many, STARTER))
    other = fleet.worker(DIFFUSION, "other", models=(STARTER,))
    await other.come()
    await fleet.gateway.jobs.create(generation())
    assert await other.work() == 1
    for each in many:
        await node.come()
        job = await fleet.gateway.jobs.create(generation(model=each.id))
        await fail_all(node, CRASH)
        await fleet.gateway.jobs.cancel(job.name)
    assert needs_avoided(node) == ["stage:diffusion"]
    await fleet.gateway.jobs.create(generation())
    assert await node.lease() == []
    await fleet.gateway.jobs.create(generation(model="m3"))
    assert len(await node.lease()) == 1, "no other worker offers it"


async def test_a_job_that_no_node_can_do_ends_with_the_part_that_failed(fleet: Fleet) -> None:
    node = await a_node(fleet)
    job = await fleet.gateway.jobs.create(using("vae:old"))
    for _ in range(FAILURES_LIMIT):
        await fail_all(node, broken("vae:old"))
        fleet.rest()
        await node.come()
    ended = answers.job(await fleet.get(job))
    assert (ended.failure.part, ended.failure.message) == ("vae:old", "is damaged")
