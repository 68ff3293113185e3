"""How a worker leaves: no new tasks, what runs ends or goes back at once."""

from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage
from tests.fakes.worker import task_named, working

NAME = "jobs/a/tasks/1"
OTHER = "jobs/b/tasks/1"


async def test_a_leaving_worker_says_so_and_leases_nothing_more(gateway: FakeGateway, stage: FakeStage) -> None:
    async with working(gateway, stage) as worker:
        await gateway.until(lambda: gateway.open_polls == 1)
        await worker.leave()
        await gateway.offer(task_named(NAME))
    assert (gateway.polls[-1].draining, gateway.polls[-1].max_tasks) == (True, 0)
    assert len(gateway.waiting) == 1


async def test_a_leaving_worker_finishes_what_it_runs(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage, drain_grace_s=20) as worker:
        await stage.until_running(NAME)
        worker.stop.set()
        await gateway.until(lambda: gateway.polls[-1].draining)
        renewals = len(gateway.renewals)
        await gateway.until(lambda: len(gateway.renewals) > renewals)
        await stage.finish(NAME)
        await worker.leave()
    assert gateway.results[NAME] == 1
    assert gateway.faults(NAME) == []


async def test_what_does_not_end_in_the_grace_goes_back_at_once(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME), task_named(OTHER))
    async with working(gateway, stage, slots=2, drain_grace_s=0.01) as worker:
        await stage.until_running(NAME, OTHER)
        await worker.leave()
    assert gateway.faults(NAME) == gateway.faults(OTHER) == ["FAULT_RETURNED"]
    assert sorted(stage.cancelled) == [NAME, OTHER]
    assert worker.admission.free == 2


async def test_a_worker_leaves_without_its_gateway(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage) as worker:
        await stage.until_running(NAME)
        await gateway.stop()
        await worker.leave()
    assert stage.cancelled == [NAME]
