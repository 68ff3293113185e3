"""Between attempts: exponential back-off, and circuit breakers of nodes that keep failing one thing."""

from dataclasses import replace

from services.gateway.domain.circuit_breaker import (
    BREAKERS_LIMIT,
    FORGET_S,
    OPEN_FIRST_S,
    OPEN_MAX_S,
    BreakerKey,
    CircuitBreaker,
    NodeBreakers,
    after_failure,
    after_success,
)
from services.gateway.domain.job import DIFFUSION, JobState
from services.gateway.domain.machine import BACKOFF_FIRST_S, BACKOFF_MAX_S, FAILURES_LIMIT, backoff_s
from tests.fakes.fleet import Fleet, FleetWorker, generation

KEY = BreakerKey(stage=DIFFUSION, device="cuda", need="checkpoint:starter")


def test_the_back_off_grows_up_to_a_limit_and_jitter_shortens_it_by_half_at_most() -> None:
    longest = [backoff_s(tries, 1.0) for tries in range(6)]
    assert longest == [0.0, 5.0, 20.0, BACKOFF_MAX_S, BACKOFF_MAX_S, BACKOFF_MAX_S]
    assert [backoff_s(tries, 0.0) for tries in range(6)] == [each / 2 for each in longest]


async def test_a_failed_task_backs_off_before_it_is_leased_again(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    await painter.fail(task)
    assert await painter.lease() == []
    fleet.rest(BACKOFF_FIRST_S)
    assert len(await painter.lease()) == 1


async def test_a_lone_broken_node_takes_minutes_to_spend_all_attempts(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    start_s = fleet.clock.now_s()
    for _ in range(FAILURES_LIMIT):
        while not (tasks := await painter.lease()):
            fleet.rest(1)
        await painter.fail(tasks[0])
    assert (await fleet.get(job)).state is JobState.FAILED
    assert fleet.clock.now_s() - start_s >= (BACKOFF_FIRST_S + BACKOFF_MAX_S) / 2


async def test_the_first_lost_lease_causes_no_back_off_and_the_next_ones_do(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    for _ in range(2):
        assert len(await painter.lease()) == 1
        await fleet.expire()
    assert await painter.lease() == []
    fleet.rest(BACKOFF_FIRST_S)
    assert len(await painter.lease()) == 1


async def test_a_clock_that_jumps_back_delays_a_task_no_longer_than_the_longest_back_off(fleet: Fleet) -> None:
    painter = fleet.worker(DIFFUSION)
    await painter.come()
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    await painter.fail(task)
    fleet.clock.jump(-86_400)
    async with fleet.restarted().running() as again:
        painter.fleet = again
        again.rest(BACKOFF_MAX_S)
        assert len(await painter.lease()) == 1


async def test_the_circuit_breaker_of_a_node_that_fails_a_model_twice_opens_and_closes_again(fleet: Fleet) -> None:
    broken, sound = fleet.worker(DIFFUSION, "broken"), fleet.worker(DIFFUSION, "sound")
    for _ in range(2):
        await fleet.gateway.jobs.create(generation())
        (task,) = await broken.lease()
        await broken.fail(task)
        fleet.rest(6)
        await sound.work()
    await fleet.gateway.jobs.create(generation())
    assert await broken.lease() == []
    await fleet.gateway.jobs.create(generation(model="other"))
    assert [task.job.request.facts.checkpoint for task in await broken.lease()] == ["other"]
    fleet.rest(OPEN_FIRST_S)
    assert [task.job.request.facts.checkpoint for task in await broken.lease()] == ["starter"]


def test_each_further_failure_doubles_the_time_and_each_success_takes_one_back() -> None:
    faults = NodeBreakers()
    times = []
    for _ in range(12):
        faults = after_failure(faults, KEY, now_s=0.0)
        times.append(faults.breakers[0].until_s)
    assert times[:4] == [0.0, OPEN_FIRST_S, 2 * OPEN_FIRST_S, 4 * OPEN_FIRST_S]
    assert times[-1] == OPEN_MAX_S
    assert after_success(faults, [KEY]).breakers == (CircuitBreaker(key=KEY, count=11),)
    for _ in range(12):
        faults = after_success(faults, [KEY])
    assert faults == NodeBreakers()
    assert after_success(faults, [KEY]) is faults


def test_a_clock_that_jumped_keeps_no_circuit_breaker_open_forever() -> None:
    faults = after_failure(after_failure(NodeBreakers(), KEY, now_s=1e6), KEY, now_s=1e6)
    assert [each.key for each in faults.open(1e6)] == [KEY]
    assert not list(faults.open(0.0))


def test_failures_of_long_ago_no_longer_count_and_a_node_has_a_limited_number_of_circuit_breakers() -> None:
    once = after_failure(NodeBreakers(), KEY, now_s=1.0)
    assert not once.is_stale(FORGET_S)
    assert once.is_stale(FORGET_S + 2)
    assert after_failure(once, KEY, now_s=FORGET_S + 2).breakers[0].count == 1
    for number in range(BREAKERS_LIMIT + 3):
        once = after_failure(once, replace(KEY, need=f"lora:{number}"), now_s=2.0)
    assert len(once.breakers) == BREAKERS_LIMIT
    assert once.breakers[-1].key.need == f"lora:{BREAKERS_LIMIT + 2}"


async def test_records_of_nodes_that_failed_nothing_for_a_day_are_deleted(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    await painter.fail(task)
    await fleet.gateway.sweep()
    assert [each.key for each in await fleet.store.list("faults", limit=9)] == ["w"]
    fleet.clock.advance(FORGET_S + 1)
    await fleet.gateway._core.circuit_breakers.sweep()
    assert await fleet.store.list("faults", limit=9) == []
