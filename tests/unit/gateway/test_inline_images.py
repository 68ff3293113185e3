"""Small images travel with leases and completions, under the rules of blobs; older workers see none of it."""

from dataclasses import replace

import grpc.aio
import pytest

from fanlight.common.v1 import common_pb2
from fanlight.contract.limits import INLINE_BLOB_LIMIT_BYTES
from fanlight.contract.names import digest_of
from fanlight.errors import FailedPrecondition, InvalidField, LeaseLost, ResultRefused, TooLarge
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.app.completion import ReportedOutput
from services.gateway.app.inline_inputs import InlineInputs
from services.gateway.domain.job import PREPROCESS, JobState
from services.gateway.wire import workers
from services.gateway.wire.stages import images_of_task
from tests.fakes.fleet import Fleet, annotation, result
from tests.fakes.rpc_gateway import serving

SIZE = (64, 64)


def sent_along(data: bytes, *, digest: str = "", scope: str = "default") -> ReportedOutput:
    width_px, height_px = SIZE
    return ReportedOutput(
        scope=scope, digest=digest or digest_of(data), width_px=width_px, height_px=height_px, data=data
    )


async def leased(fleet: Fleet, job=None):
    worker = fleet.worker(PREPROCESS)
    await worker.come()
    made = await fleet.gateway.jobs.create(job or annotation())
    (task,) = await worker.lease()
    return made, task


async def test_an_output_that_comes_along_completes_the_task_and_is_kept(fleet: Fleet) -> None:
    job, task = await leased(fleet)
    data = result(*SIZE, b"edges")
    await fleet.gateway.queue.complete(task.token, [sent_along(data)], [])
    done = await fleet.get(job)
    assert done.state is JobState.SUCCEEDED
    assert done.tasks[0].outputs[0].blob.digest == digest_of(data)
    kept = [chunk async for chunk in fleet.blobs.read("default", digest_of(data))]
    assert b"".join(kept) == data
    # The answer was lost: the same again is no error.
    await fleet.gateway.queue.complete(task.token, [sent_along(data)], [])


async def test_bytes_of_another_digest_are_refused_and_the_lease_lives(fleet: Fleet) -> None:
    _, task = await leased(fleet)
    data = result(*SIZE, b"edges")
    with pytest.raises(InvalidField) as refused:
        await fleet.gateway.queue.complete(task.token, [sent_along(data, digest=digest_of(b"other"))], [])
    assert refused.value.field == "outputs[0].data"
    await fleet.gateway.queue.complete(task.token, [sent_along(data)], [])


async def test_what_comes_along_is_checked_like_a_blob(fleet: Fleet) -> None:
    _, task = await leased(fleet)
    with pytest.raises(ResultRefused, match="is no image"):
        await fleet.gateway.queue.complete(task.token, [sent_along(b"no picture")], [])


async def test_what_comes_along_stays_in_the_scope_of_the_task(fleet: Fleet) -> None:
    _, task = await leased(fleet)
    data = result(*SIZE, b"edges")
    with pytest.raises(InvalidField) as refused:
        await fleet.gateway.queue.complete(task.token, [sent_along(data, scope="acme")], [])
    assert refused.value.field == "outputs[0].blob.scope"
    assert await fleet.blobs.stat("acme", digest_of(data)) is None


async def test_nothing_is_stored_without_a_live_lease(fleet: Fleet) -> None:
    """Neither for a token that is no longer the task's, nor for one whose task is complete."""
    _, task = await leased(fleet)
    more = result(*SIZE, b"more")
    await fleet.gateway.queue.give_back(task.token)
    with pytest.raises(LeaseLost):
        await fleet.gateway.queue.complete(task.token, [sent_along(more)], [])
    worker = fleet.worker(PREPROCESS, "second")
    await worker.come()
    (again,) = await worker.lease()
    await fleet.gateway.queue.complete(again.token, [sent_along(result(*SIZE, b"edges"))], [])
    with pytest.raises(FailedPrecondition):
        await fleet.gateway.queue.complete(again.token, [sent_along(more)], [])
    assert await fleet.blobs.stat("default", digest_of(more)) is None


def test_more_bytes_than_may_come_along_are_refused_by_name() -> None:
    output = queue_pb2.Output(blob=common_pb2.Blob(digest=digest_of(b"")), data=bytes(INLINE_BLOB_LIMIT_BYTES + 1))
    with pytest.raises(TooLarge) as refused:
        workers.made(queue_pb2.CompleteTaskRequest(outputs=[output]))
    assert refused.value.field == "outputs[0].data"


async def given(fleet: Fleet, tasks, bytes_max: int) -> list[list[str]]:
    inline = InlineInputs(fleet.blobs, images_of_task)
    return [
        [each.digest for each in task.inline_inputs] for task in await inline.with_images(tasks, bytes_max=bytes_max)
    ]


async def test_small_input_images_come_with_the_lease_as_far_as_they_fit(fleet: Fleet) -> None:
    _, task = await leased(fleet)
    ((_, digest),) = images_of_task(task.job, task.task)
    info = await fleet.blobs.stat("default", digest)
    assert await given(fleet, [task], 10**9) == [[digest]]
    assert await given(fleet, [task], info.size_bytes) == [[digest]]
    assert await given(fleet, [task], info.size_bytes - 1) == [[]]
    assert await given(fleet, [task], 0) == [[]]


async def test_an_image_of_two_tasks_comes_once(fleet: Fleet) -> None:
    _, task = await leased(fleet)
    ((_, digest),) = images_of_task(task.job, task.task)
    assert await given(fleet, [task, replace(task, token="other")], 10**9) == [[digest], []]


async def test_an_image_that_is_gone_or_large_is_left_to_the_worker(fleet: Fleet) -> None:
    _, task = await leased(fleet)
    ((_, digest),) = images_of_task(task.job, task.task)
    await fleet.blobs.delete("default", digest)
    assert await given(fleet, [task], 10**9) == [[]]


async def test_a_storage_that_workers_reach_themselves_is_not_read_for_them(fleet: Fleet) -> None:
    class Direct:
        async def prepare_upload(self, scope, digest, size_bytes): ...
        async def prepare_read(self, scope, digest): ...

    inline = InlineInputs(Direct(), images_of_task)
    _, task = await leased(fleet)
    assert await inline.with_images([task], bytes_max=10**9) == [task]
    assert inline.output_bytes_max == 0


@pytest.mark.parametrize(("bytes_max", "count"), [(0, 0), (10**6, 1)])
async def test_only_a_worker_that_takes_images_gets_them(fleet: Fleet, bytes_max: int, count: int) -> None:
    """0 is what a worker sends that does not know the field."""
    worker = fleet.worker(PREPROCESS)
    await worker.come()
    await fleet.gateway.jobs.create(annotation())
    request = queue_pb2.LeaseTasksRequest(
        worker=queue_pb2.Worker(id="another", node="another", stage=PREPROCESS, slots=1),
        capabilities_digest=b"its own",
        max_tasks=1,
        wait_s=5,
        inline_bytes_max=bytes_max,
    )
    request.capabilities.annotators.add(id="canny", version="1")
    async with serving(fleet) as address, grpc.aio.insecure_channel(address) as channel:
        answer = await queue_pb2_grpc.QueueServiceStub(channel).LeaseTasks(request)
    assert [len(each.inline_inputs) for each in answer.tasks] == [count]
    assert answer.inline_output_bytes_max == INLINE_BLOB_LIMIT_BYTES
