"""How a worker gets its tasks: what it offers, what it reports, and how it copes with a bad connection."""

import asyncio
import re

import pytest

from fanlight.contract.needs import REVISION
from fanlight.errors import ResourceExhausted
from fanlight.queue.v1 import queue_pb2
from services.worker.loop import EARLY_PAUSE_S, holdings_digest
from services.worker.retry import Env
from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage
from tests.fakes.worker import task_named, working


async def test_leased_tasks_run_and_their_outputs_are_sent(gateway: FakeGateway, stage: FakeStage) -> None:
    await gateway.offer(*(task_named(f"jobs/{n}/tasks/1") for n in range(5)))
    async with working(gateway, stage, slots=2):
        await gateway.until(lambda: len(gateway.completed) == 5)
    output = next(iter(gateway.completed.values())).outputs[0]
    assert gateway.blobs[output.blob.digest] == b"an output"
    assert (output.width_px, output.height_px, output.HasField("seed")) == (8, 6, False)
    assert set(gateway.results.values()) == {1}


async def test_never_more_tasks_than_slots_run_at_a_time(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(*(task_named(f"jobs/{n}/tasks/1") for n in range(20)))
    async with working(gateway, stage, slots=3):
        await stage.until(lambda: len(stage.running) == 3)
        await stage.let_go()
        await gateway.until(lambda: len(gateway.completed) == 20)
    assert stage.most_at_a_time == 3
    assert max(poll.max_tasks for poll in gateway.polls) == 3


async def test_a_batch_is_no_larger_than_the_setting(gateway: FakeGateway, stage: FakeStage) -> None:
    async with working(gateway, stage, slots=8, limits={"batch_tasks": 2}):
        await gateway.until(lambda: gateway.open_polls == 1)
    assert gateway.polls[0].max_tasks == 2


async def test_more_tasks_than_were_asked_for_go_back_at_once(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    gateway.lease = lambda count: FakeGateway.lease(gateway, 3 if count else 0)  # type: ignore[method-assign]
    await gateway.offer(*(task_named(f"jobs/{n}/tasks/1") for n in range(3)))
    async with working(gateway, stage, slots=2):
        await gateway.until(lambda: gateway.faults("jobs/2/tasks/1") == ["FAULT_RETURNED"])
        assert stage.most_at_a_time <= 2


async def test_a_worker_says_who_it_is_and_what_it_can_do(gateway: FakeGateway, stage: FakeStage) -> None:
    async with working(gateway, stage, slots=2):
        await gateway.until(lambda: gateway.open_polls == 1)
    worker = gateway.polls[0].worker
    assert worker.id.startswith("node-1-preprocess-")
    assert (worker.node, worker.stage, worker.device, worker.slots) == ("node-1", "preprocess", "cpu", 2)
    assert list(worker.disk_models) == ["starter"]
    assert worker.version


async def test_a_node_may_have_any_name(gateway: FakeGateway, stage: FakeStage) -> None:
    async with working(gateway, stage, node="Jo's PC " + "ü" * 100):
        await gateway.until(lambda: gateway.open_polls == 1)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", gateway.polls[0].worker.id)


async def test_capabilities_travel_once_then_when_asked_for_and_when_they_change(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    gateway.wants_capabilities = 1
    async with working(gateway, stage, poll_wait_s=0.1):
        await gateway.until(lambda: len(gateway.polls) >= 4)
        sent = [poll.HasField("capabilities") for poll in gateway.polls[:4]]
        assert sent == [True, True, False, False]
        digest = gateway.polls[3].capabilities_digest
        stage.version = "2"
        await gateway.until(lambda: gateway.polls[-1].capabilities_digest != digest)
        assert gateway.polls[-1].capabilities.annotators[0].version == "2"


async def test_workers_that_can_do_the_same_send_the_same_capabilities(gateway: FakeGateway) -> None:
    stages = FakeStage(), FakeStage()
    stages[0].annotators, stages[1].annotators = ["canny", "mlsd", "invert"], ["mlsd", "invert", "canny"]
    for stage in stages:
        async with working(gateway, stage):
            await gateway.until(lambda: gateway.open_polls == 1)
    first, second = {poll.worker.id: poll for poll in gateway.polls if poll.HasField("capabilities")}.values()
    assert [annotator.id for annotator in first.capabilities.annotators] == ["canny", "invert", "mlsd"]
    assert first.capabilities == second.capabilities
    assert first.capabilities_digest == second.capabilities_digest


async def test_a_worker_says_which_fields_it_knows(gateway: FakeGateway, stage: FakeStage) -> None:
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.open_polls == 1)
    contract = gateway.polls[0].capabilities.contract
    last_fields = {message.name: message.last_field for message in contract.messages}
    assert contract.revision == REVISION
    assert last_fields["fanlight.preprocessor.v1.AnnotateRequest"] == 5
    assert last_fields["fanlight.common.v1.ImageSource"] == 3


async def test_a_full_worker_still_reports_itself_and_what_it_holds(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named("jobs/a/tasks/1"))
    async with working(gateway, stage, limits={"report_every_s": 0.01}):
        await gateway.until(lambda: len(gateway.polls) >= 3)
        assert gateway.polls[-1].max_tasks == 0
        assert list(gateway.polls[-1].held_lease_tokens) == [b"token-1"]
    assert not gateway.taken_back


async def test_a_lost_answer_loses_no_task(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.lost_answers["LeaseTasks"] = 1
    await gateway.offer(task_named("jobs/a/tasks/1"))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results["jobs/a/tasks/1"] == 1)
    assert gateway.taken_back["jobs/a/tasks/1"] == 1


async def test_a_direct_call_takes_a_slot_that_is_offered_and_the_task_for_it_goes_back(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    async with working(gateway, stage, slots=2) as worker:
        await gateway.until(lambda: gateway.open_polls == 1 and gateway.polls[0].max_tasks == 2)
        async with asyncio.timeout(10), worker.admission.enter():
            await gateway.offer(*(task_named(f"jobs/{n}/tasks/1") for n in range(3)))
            await gateway.until(lambda: len(gateway.completed) == 3)
            assert gateway.faults("jobs/1/tasks/1") == ["FAULT_RETURNED"]
            assert stage.most_at_a_time == 1
    assert not gateway.taken_back


async def test_a_full_worker_disowns_at_once_what_came_with_a_lost_answer(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    gateway.lost_answers["LeaseTasks"] = 1
    async with working(gateway, stage, limits={"report_every_s": 1_000}) as worker:
        await gateway.until(lambda: gateway.open_polls == 1)
        async with worker.admission.enter():
            await gateway.offer(task_named("jobs/a/tasks/1"))
            await gateway.until(lambda: gateway.taken_back["jobs/a/tasks/1"] == 1)


async def test_a_slot_that_a_direct_call_left_is_offered_again(gateway: FakeGateway, stage: FakeStage) -> None:
    async with working(gateway, stage, poll_wait_s=0.2) as worker:
        async with worker.admission.enter():
            await gateway.until(lambda: bool(gateway.polls) and gateway.polls[-1].max_tasks == 0)
        await gateway.until(lambda: gateway.polls[-1].max_tasks == 1)


async def test_direct_calls_wait_behind_leased_tasks_and_only_so_many(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named("jobs/a/tasks/1"))
    async with working(gateway, stage) as worker:
        await stage.until_running("jobs/a/tasks/1")
        calls = [asyncio.create_task(_call(worker.admission)) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted):
            await _call(worker.admission)
        await stage.finish("jobs/a/tasks/1")
        await asyncio.gather(*calls)


async def _call(admission: object) -> None:
    async with admission.enter():  # type: ignore[attr-defined]
        pass


async def test_a_task_that_must_run_alone_waits_for_the_others_and_holds_back_the_next(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    stage.holds = True
    await gateway.offer(task_named("jobs/a/tasks/1"), task_named("jobs/b/tasks/1", alone=True))
    async with working(gateway, stage, slots=3):
        await stage.until_running("jobs/a/tasks/1")
        await gateway.offer(task_named("jobs/c/tasks/1"))
        await stage.finish("jobs/a/tasks/1")
        await stage.until_running("jobs/b/tasks/1")
        await stage.finish("jobs/b/tasks/1")
        await stage.until_running("jobs/c/tasks/1")
    assert stage.beside["jobs/b/tasks/1"] == 0


async def test_two_tasks_that_must_run_alone_do_not_wait_for_each_other_forever(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    await gateway.offer(*(task_named(f"jobs/{n}/tasks/1", alone=True) for n in range(4)))
    async with working(gateway, stage, slots=2):
        await gateway.until(lambda: len(gateway.completed) == 4)
    assert stage.most_at_a_time == 1


async def test_a_worker_sends_its_token(stage: FakeStage) -> None:
    gateway = FakeGateway(token="a worker's")
    await gateway.start()
    await gateway.offer(task_named("jobs/a/tasks/1"))
    async with working(gateway, stage, token="a worker's"):
        await gateway.until(lambda: gateway.results["jobs/a/tasks/1"] == 1)
    await gateway.stop()


async def test_a_gateway_that_answers_early_with_nothing_does_not_make_the_worker_spin(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    pauses: list[float] = []

    async def sleep(duration_s: float) -> None:
        pauses.append(duration_s)
        await asyncio.sleep(min(duration_s, 0.01))

    async def answer_at_once(wait_s: float) -> None:
        pass

    gateway.wait_for_tasks = answer_at_once  # type: ignore[method-assign]
    async with working(gateway, stage, env=Env(sleep=sleep)):
        await gateway.until(lambda: len(gateway.polls) >= 5)
    assert pauses.count(EARLY_PAUSE_S) >= 3


async def test_a_gateway_that_refuses_a_poll_is_asked_again(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.refusals["LeaseTasks"] = 3
    await gateway.offer(task_named("jobs/a/tasks/1"))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results["jobs/a/tasks/1"] == 1)


async def test_the_first_poll_is_short_and_so_is_the_first_after_a_failure(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.open_polls == 1 and len(gateway.polls) == 2)
        assert [poll.wait_s for poll in gateway.polls] == [0.0, 5.0]
        await gateway.stop()
        gateway.polls.clear()
        await gateway.start()
        await gateway.until(lambda: len(gateway.polls) == 2)
        assert [poll.wait_s for poll in gateway.polls] == [0.0, 5.0]


async def polls_of(gateway: FakeGateway, stage: FakeStage, count: int) -> list[tuple[list[str], bool]]:
    """What a worker reports to hold, and whether it says that this is as before."""
    limits = {"report_every_s": 0.01}
    async with working(gateway, stage, slots=2, poll_wait_s=0.01, limits=limits):
        await gateway.until(lambda: len(gateway.polls) >= count)
    polls = [each for each in gateway.polls if not each.draining]
    return [(list(each.worker.disk_models), each.holdings_unchanged) for each in polls[:count]]


async def test_models_that_a_worker_holds_are_sent_when_they_change(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.knows_holdings = True
    assert await polls_of(gateway, stage, 3) == [(["starter"], False), ([], True), ([], True)]


async def test_to_an_older_gateway_they_are_sent_with_every_poll(gateway: FakeGateway, stage: FakeStage) -> None:
    assert await polls_of(gateway, stage, 3) == [(["starter"], False)] * 3


def test_the_digest_of_what_is_held_does_not_depend_on_the_order() -> None:
    worker = queue_pb2.Worker(vram_models=["a", "b"], disk_models=["c"], goodput_bps=1.0)
    other = queue_pb2.Worker(vram_models=["b", "a"], disk_models=["c"], goodput_bps=2.0)
    assert holdings_digest(worker) == holdings_digest(other)
    other.unfetched_models.append("d")
    assert holdings_digest(worker) != holdings_digest(other)
