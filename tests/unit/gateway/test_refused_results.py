"""A worker that hands in what is no result fails the task, gets no more of its kind, and the job goes on elsewhere."""

import pytest

from fanlight.common.v1 import common_pb2
from fanlight.contract.names import digest_of
from fanlight.errors import LeaseLost, ResultRefused
from fanlight.queue.v1 import queue_pb2
from services.gateway.domain.job import DIFFUSION, PREPROCESS, JobState
from services.gateway.wire import workers
from tests.fakes.fleet import Fleet, annotation, generation, result

GARBAGE = [b"not a picture at all", b"<html><script>alert(1)</script></html>"]


@pytest.mark.parametrize("data", GARBAGE)
@pytest.mark.parametrize("stage", [DIFFUSION, PREPROCESS])
async def test_garbage_is_refused_and_the_job_succeeds_elsewhere(fleet: Fleet, data: bytes, stage: str) -> None:
    liar, sound = fleet.worker(stage, "liar"), fleet.worker(stage, "sound")
    await liar.come()
    job = await fleet.gateway.jobs.create(generation() if stage == DIFFUSION else annotation())
    (task,) = await liar.lease()
    with pytest.raises(ResultRefused, match="is no image") as refused:
        await liar.hand_in(task, data)
    assert refused.value.field == "outputs[0].blob"
    kept = await fleet.get(job)
    assert kept.state is JobState.QUEUED
    assert [each.failure.reason for each in kept.tasks[0].attempts if each.failure] == ["RESULT_REFUSED"]
    await sound.come()
    fleet.rest(10.0)
    await sound.come()
    assert await sound.work() == 1
    assert (await fleet.get(job)).state is JobState.SUCCEEDED


async def test_an_image_of_another_size_than_asked_for_is_refused(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    await worker.come()
    await fleet.gateway.jobs.create(generation(width_px=128, height_px=96))
    (task,) = await worker.lease()
    with pytest.raises(ResultRefused, match="128 x 96 was asked for"):
        await worker.hand_in(task, result(96, 128, b""), (96, 128))


async def test_its_lease_has_ended_at_once(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    await worker.come()
    await fleet.gateway.jobs.create(generation())
    (task,) = await worker.lease()
    with pytest.raises(ResultRefused):
        await worker.hand_in(task, GARBAGE[0])
    with pytest.raises(LeaseLost):
        await worker.hand_in(task, result(256, 256, b""), (256, 256))


async def test_after_one_refused_result_a_node_gets_such_tasks_only_where_no_other_can_do_them(fleet: Fleet) -> None:
    liar, sound = fleet.worker(DIFFUSION, "liar"), fleet.worker(DIFFUSION, "sound")
    await liar.come()
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await liar.lease()
    with pytest.raises(ResultRefused):
        await liar.hand_in(task, GARBAGE[0])
    await fleet.gateway.jobs.cancel(job.name)
    await sound.come()
    (avoided,) = fleet.gateway.workers.avoidances_of(liar.worker.id)
    assert avoided.need == "checkpoint:starter"
    assert "RESULT_REFUSED" in avoided.why
    await fleet.gateway.jobs.create(generation())
    assert await liar.lease() == []
    assert await sound.work() == 1


async def test_a_task_that_only_a_liar_can_do_dies_after_its_attempts(fleet: Fleet) -> None:
    liar = fleet.worker(PREPROCESS, "liar")
    await liar.come()
    job = await fleet.gateway.jobs.create(annotation())
    for _ in range(3):
        (task,) = await liar.lease()
        liar.held.clear()
        with pytest.raises(ResultRefused):
            await liar.hand_in(task, GARBAGE[0])
        fleet.rest(120.0)
        await liar.come()
    kept = await fleet.get(job)
    assert kept.state is JobState.FAILED
    assert kept.failure is not None
    assert "is no image" in kept.failure.message


async def test_a_size_that_no_image_has_ends_the_attempt_like_any_other_false_one(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    await worker.come()
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await worker.lease()
    blob = common_pb2.Blob(scope="default", digest=digest_of(b""))
    output = queue_pb2.Output(blob=blob, width_px=4_000_000_000, height_px=256)
    (made,) = workers.made(queue_pb2.CompleteTaskRequest(outputs=[output]))
    with pytest.raises(ResultRefused, match="says another size"):
        await worker.hand_in(task, result(256, 256, b""), (made.width_px, made.height_px))
    assert (await fleet.get(job)).state is JobState.QUEUED
