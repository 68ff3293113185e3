"""A source of weights that is away costs no node anything, and jobs that need it wait together."""

from dataclasses import replace

from fanlight.contract.names import ANY
from services.gateway.app.source_backoffs import SOURCES_LIMIT, SourceBackoffs
from services.gateway.domain.job import DIFFUSION, Failure, Fault, Job, JobState
from services.gateway.domain.machine import BACKOFF_FIRST_S, BACKOFF_MAX_S, FAILURES_LIMIT
from services.gateway.domain.workers import AnnouncedModel
from tests.fakes.fleet import STARTER, FakeClock, Fleet, FleetWorker, generation

AWAY = Failure(reason="UNAVAILABLE", message="cannot reach the hub", part="source:hub.example")
MODEL = "hf:org/model"
OFFERS = (STARTER, AnnouncedModel(id=MODEL, kind="checkpoint"), AnnouncedModel(id=ANY, kind="checkpoint"))


async def a_node(fleet: Fleet, name: str = "node", held: frozenset[str] = frozenset({"starter"})) -> FleetWorker:
    worker = fleet.worker(DIFFUSION, name, models=OFFERS)
    worker.disk = held
    await worker.come()
    return worker


async def attempts_of(fleet: Fleet, jobs: list[Job]) -> int:
    return sum([len((await fleet.get(job)).tasks[0].attempts) for job in jobs])


async def fail_what_comes(worker: FleetWorker) -> int:
    failed = 0
    while tasks := await worker.lease():
        await worker.fail(tasks[0], Fault.NODE, AWAY)
        failed += 1
    return failed


async def test_ten_jobs_for_a_source_that_is_away_do_not_spin(fleet: Fleet) -> None:
    node = await a_node(fleet)
    jobs = [await fleet.gateway.jobs.create(generation(model=MODEL)) for _ in range(10)]
    assert await fail_what_comes(node) == 1, "the others wait for the source"
    found = fleet.gateway.explanations.of(await fleet.get(jobs[-1]))
    assert "hub.example could not be reached; the retry starts in 5 s" in found.summary
    fleet.rest(BACKOFF_FIRST_S)
    assert await fail_what_comes(node) == 1
    await fleet.gateway.jobs.create(generation())
    assert await node.work() == 1, "what the node holds it does at once"
    for _ in range(40):
        fleet.rest(BACKOFF_MAX_S)
        await node.come()
        await fail_what_comes(node)
    assert await attempts_of(fleet, jobs) == FAILURES_LIMIT * 10
    assert {(await fleet.get(job)).state for job in jobs} == {JobState.FAILED}
    assert (await fleet.get(jobs[0])).failure.part == "source:hub.example"


async def test_no_circuit_breaker_opens_and_nobody_is_set_aside(fleet: Fleet) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "other")
    for _ in range(10):
        await fleet.gateway.jobs.create(generation(model=MODEL))
        fleet.rest(BACKOFF_MAX_S)
        await fail_what_comes(node)
    assert await fleet.store.list("faults", limit=9) == []
    assert not any(each.draining_reason for each in fleet.gateway.workers.statuses())


async def test_a_node_that_holds_the_model_or_can_reach_the_source_gets_the_jobs(fleet: Fleet) -> None:
    node = await a_node(fleet)
    jobs = [await fleet.gateway.jobs.create(generation(model=MODEL)) for _ in range(3)]
    assert await fail_what_comes(node) == 1
    holder = await a_node(fleet, "holder", frozenset({"starter", MODEL}))
    fleet.gateway._core.queue_index.release_due()
    assert await node.lease() == []
    assert await holder.work() == 2, "all but the one that backs off itself"
    fleet.rest(BACKOFF_FIRST_S)
    await holder.come()
    assert await holder.work() == 1
    assert [(await fleet.get(job)).state for job in jobs] == [JobState.SUCCEEDED] * 3


async def test_while_it_lasts_the_node_gets_such_tasks_last_and_says_why(fleet: Fleet) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "other")
    await fleet.gateway.jobs.create(generation(model=MODEL))
    assert await fail_what_comes(node) == 1
    (avoided,) = fleet.gateway.workers.avoidances_of(node.worker.id)
    assert (avoided.need, avoided.why) == (f"checkpoint:{MODEL}", "the node cannot reach hub.example")
    assert avoided.until_s == fleet.clock.now_s() + BACKOFF_FIRST_S
    fleet.clock.advance(BACKOFF_FIRST_S)
    assert not fleet.gateway.workers.avoidances_of(node.worker.id)


async def test_a_source_is_not_believed_of_a_worker_that_has_nothing_to_fetch(fleet: Fleet) -> None:
    node, _ = await a_node(fleet), await a_node(fleet, "other")
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await node.lease()
    await node.fail(task, Fault.NODE, AWAY)
    assert (await fleet.get(job)).tasks[0].failure.part == ""
    assert not fleet.gateway.workers.avoidances_of(node.worker.id)


async def test_a_restarted_gateway_still_waits_for_the_source(fleet: Fleet) -> None:
    node = await a_node(fleet)
    jobs = [await fleet.gateway.jobs.create(generation(model=MODEL)) for _ in range(3)]
    assert await fail_what_comes(node) == 1
    async with fleet.restarted().running() as again:
        node.fleet = again
        await node.come()
        assert await node.lease() == []
        again.rest(BACKOFF_MAX_S)
        await node.come()
        assert await fail_what_comes(node) >= 1
        assert await attempts_of(again, jobs) >= 2


async def test_the_number_of_sources_is_limited(fleet: Fleet) -> None:
    node, clock = await a_node(fleet), FakeClock()
    job = await fleet.gateway.jobs.create(generation(model=MODEL))
    assert await fail_what_comes(node) == 1
    job, sources = await fleet.get(job), SourceBackoffs(clock)
    (task,), (attempt,) = job.tasks, job.tasks[0].attempts
    for number in range(SOURCES_LIMIT + 5):
        failed = replace(attempt, failure=replace(AWAY, part=f"source:{number}.example"))
        sources.observe(replace(job, tasks=(replace(task, attempts=(failed,)),)))
    assert len(sources.avoided("node", frozenset())) == SOURCES_LIMIT
