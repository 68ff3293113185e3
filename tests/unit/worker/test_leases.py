"""What happens to a lease while its task runs: renewed, lost, cancelled, kept across a gateway's restart."""

import asyncio

from fanlight.queue.v1 import queue_pb2
from services.weights.transfer.download import DownloadProgress as Download
from services.worker.leases import PREVIEW_BYTES_MAX
from services.worker.ports import StageProgress
from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage
from tests.fakes.worker import task_named, working

NAME = "jobs/a/tasks/1"
OTHER = "jobs/b/tasks/1"
Status = queue_pb2.RenewedLease


async def test_leases_are_renewed_in_one_call_while_their_tasks_run(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME), task_named(OTHER))
    async with working(gateway, stage, slots=2):
        await gateway.until(lambda: len(gateway.renewals) >= 3)
        assert {each.lease_token for each in gateway.renewals[-1].renewals} == {b"token-1", b"token-2"}
        assert gateway.renewals[-1].worker_id == gateway.polls[0].worker.id


async def test_progress_goes_up_and_only_the_latest_counts(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await stage.until_running(NAME)
        for step in range(1, 8):
            stage.report(NAME, step, preview=b"small")
        await gateway.until(lambda: bool(gateway.progress.get(NAME)))
        latest = gateway.progress[NAME][-1]
        assert (latest.step, latest.steps, latest.preview) == (7, 10, b"small")
        assert len(gateway.progress[NAME]) == 1


async def test_progress_may_be_reported_from_any_thread(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await stage.until_running(NAME)
        await asyncio.to_thread(stage.report, NAME, 3)
        await gateway.until(lambda: bool(gateway.progress.get(NAME)))


async def test_a_preview_that_is_too_large_is_left_out(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await stage.until_running(NAME)
        stage.report(NAME, 2, preview=bytes(PREVIEW_BYTES_MAX + 1))
        await gateway.until(lambda: bool(gateway.progress.get(NAME)))
    assert gateway.progress[NAME][0].step == 2
    assert gateway.progress[NAME][0].preview == b""


async def test_previews_are_made_only_when_a_report_is_due_and_the_newest_goes_with_it(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    stage.holds = True
    gateway.ttl_s = 3_000.0
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage, progress_every_s=0.3):
        await stage.until_running(NAME)
        stage.report(NAME, 1)
        await gateway.until(lambda: len(gateway.progress.get(NAME, [])) == 1)
        # Before the next report is due; later steps have no preview of their own.
        for step in range(2, 10):
            stage.report(NAME, step, preview=b"step %d" % step if step in (2, 4, 6) else b"")
        await gateway.until(lambda: len(gateway.progress[NAME]) == 2)
        await stage.finish(NAME)
        await gateway.until(lambda: gateway.results[NAME] == 1)
    assert [(each.step, each.preview) for each in gateway.progress[NAME]] == [(1, b""), (9, b"step 6")]
    assert stage.previews_made == [6]


async def test_each_image_of_a_batch_has_its_own_preview(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME), task_named(OTHER))
    async with working(gateway, stage, slots=2):
        await stage.until_running(NAME, OTHER)
        stage.report(NAME, 2, preview=b"one")
        stage.report(OTHER, 2, preview=b"other")
        await gateway.until(lambda: {NAME, OTHER} <= set(gateway.progress))
    assert [gateway.progress[name][0].preview for name in (NAME, OTHER)] == [b"one", b"other"]


async def test_the_fetching_of_weights_goes_up_as_progress(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME))
    coming = Download(reference="sd15", path="", done_bytes=40, total_bytes=100, bytes_per_s=10.0, source="hub.example")
    async with working(gateway, stage):
        await stage.until_running(NAME)
        stage.running[NAME](StageProgress(fetch=coming))
        await gateway.until(lambda: bool(gateway.progress.get(NAME)))
    sent = gateway.progress[NAME][0].fetch
    assert (sent.reference, sent.done_bytes, sent.total_bytes) == ("sd15", 40, 100)
    assert (sent.goodput_bps, sent.seconds_left, sent.source) == (80.0, 6.0, "hub.example")


async def test_a_cancel_comes_down_and_stops_only_its_task(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME), task_named(OTHER))
    async with working(gateway, stage, slots=2) as worker:
        await stage.until_running(NAME, OTHER)
        gateway.statuses[NAME] = Status.STATUS_CANCELLED
        await stage.until(lambda: stage.cancelled == [NAME])
        assert list(stage.running) == [OTHER]
        await stage.finish(OTHER)
        await gateway.until(lambda: gateway.results[OTHER] == 1)
        assert worker.admission.waiting == 0
    assert gateway.results[NAME] == 0
    assert gateway.faults(NAME) == []


async def test_a_lost_lease_stops_its_task_and_frees_the_slot(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await stage.until_running(NAME)
        gateway.statuses[NAME] = Status.STATUS_LOST
        await gateway.offer(task_named(OTHER))
        await stage.until_running(OTHER)
    assert stage.cancelled[0] == NAME
    assert gateway.faults(NAME) == []


async def test_a_result_for_a_lost_lease_is_dropped_and_the_worker_goes_on(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    stage.holds = True
    gateway.ttl_s = 1_000.0
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage, drain_grace_s=20):
        await stage.until_running(NAME)
        gateway.leased.clear()
        await stage.finish(NAME)
        await gateway.until(lambda: gateway.calls["CompleteTask"] == 1)
        await gateway.offer(task_named(OTHER))
        await stage.finish(OTHER)
        await gateway.until(lambda: gateway.results[OTHER] == 1)
    assert gateway.results[NAME] == 0
    assert gateway.calls["FailTask"] == 0


async def test_a_gateway_that_starts_again_keeps_the_leases_of_tasks_that_ran_on(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    stage.holds = True
    await gateway.offer(task_named(NAME), task_named(OTHER))
    async with working(gateway, stage, slots=2):
        await stage.until_running(NAME, OTHER)
        await gateway.stop()
        await stage.finish(NAME)
        await gateway.start()
        renewals = len(gateway.renewals)
        await gateway.until(lambda: len(gateway.renewals) > renewals and gateway.results[NAME] == 1)
        await stage.finish(OTHER)
        await gateway.until(lambda: gateway.results[OTHER] == 1)
    assert stage.cancelled == []
    assert not gateway.taken_back


async def test_renewals_that_fail_end_no_work(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.holds = True
    gateway.refusals["RenewLeases"] = 5
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: len(gateway.renewals) >= 1)
        await stage.finish(NAME)
        await gateway.until(lambda: gateway.results[NAME] == 1)
