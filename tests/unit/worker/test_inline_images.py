"""Small images travel with leases and completions; a gateway of another version gets and sends them as blobs."""

from fanlight.contract.limits import INLINE_LEASE_LIMIT_BYTES
from fanlight.contract.names import digest_of
from fanlight.queue.v1 import queue_pb2
from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage
from tests.fakes.worker import task_named, working

TASK = "jobs/1/tasks/1"


def task_with(gateway: FakeGateway, data: bytes, *, sent: bytes) -> queue_pb2.LeasedTask:
    """To annotate an image that the gateway has as a blob, and for which it sends these bytes along."""
    blob = gateway.keep(data)
    task = task_named(TASK, blob=blob)
    task.inline_inputs.add(scope=blob.scope, digest=blob.digest, data=sent)
    return task


async def test_an_image_that_came_with_the_lease_is_not_fetched(gateway: FakeGateway, stage: FakeStage) -> None:
    await gateway.offer(task_with(gateway, b"photo", sent=b"photo"))
    async with working(gateway, stage):
        await gateway.until(lambda: bool(gateway.completed))
    assert stage.images[TASK] == b"photo"
    assert gateway.calls["ReadBlob"] == 0
    assert gateway.polls[0].inline_bytes_max == INLINE_LEASE_LIMIT_BYTES


async def test_an_image_of_another_digest_is_fetched(gateway: FakeGateway, stage: FakeStage) -> None:
    await gateway.offer(task_with(gateway, b"photo", sent=b"another"))
    async with working(gateway, stage):
        await gateway.until(lambda: bool(gateway.completed))
    assert stage.images[TASK] == b"photo"
    assert gateway.calls["ReadBlob"] == 1


async def test_a_small_output_goes_along_with_the_completion(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.inline_output_bytes_max = 100
    await gateway.offer(task_named(TASK))
    async with working(gateway, stage):
        await gateway.until(lambda: bool(gateway.completed))
    (output,) = next(iter(gateway.completed.values())).outputs
    assert output.data == b"an output"
    assert (output.blob.scope, output.blob.digest, output.blob.size_bytes) == ("default", digest_of(b"an output"), 9)
    assert gateway.calls["WriteBlob"] == 0


async def test_a_large_output_is_written_before(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.inline_output_bytes_max = 8
    await gateway.offer(task_named(TASK))
    async with working(gateway, stage):
        await gateway.until(lambda: bool(gateway.completed))
    assert next(iter(gateway.completed.values())).outputs[0].data == b""
    assert gateway.calls["WriteBlob"] == 1


async def test_an_older_gateway_gets_a_blob(gateway: FakeGateway, stage: FakeStage) -> None:
    await gateway.offer(task_named(TASK))
    async with working(gateway, stage):
        await gateway.until(lambda: bool(gateway.completed))
    assert next(iter(gateway.completed.values())).outputs[0].data == b""
    assert gateway.calls["WriteBlob"] == 1


async def test_a_gateway_that_missed_what_came_along_gets_a_blob(gateway: FakeGateway, stage: FakeStage) -> None:
    """The lease came from a newer gateway than the one that the completion reaches."""
    gateway.inline_output_bytes_max, gateway.drops_inline = 100, True
    await gateway.offer(task_named(TASK))
    async with working(gateway, stage):
        await gateway.until(lambda: bool(gateway.completed))
    assert gateway.calls["CompleteTask"] == 2
    assert gateway.blobs[digest_of(b"an output")] == b"an output"
