"""A stage that the worker's code does not know is leased, run and completed like any other."""

from google.protobuf import wrappers_pb2

from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.toy_stage import UppercaseStage
from tests.fakes.worker import task_named, task_of, working

NAME = "jobs/a/tasks/1"


def shout(value: str, name: str = NAME):
    return task_of(wrappers_pb2.StringValue(value=value), name)


async def test_a_stage_is_a_message_and_a_worker(gateway: FakeGateway) -> None:
    await gateway.offer(shout("a fox in the snow"))
    async with working(gateway, UppercaseStage()):
        await gateway.until(lambda: gateway.results[NAME] == 1)
    (completed,) = gateway.completed.values()
    (output,) = completed.outputs
    assert gateway.blobs[output.blob.digest] == b"A FOX IN THE SNOW"
    poll = gateway.polls[0]
    assert poll.worker.stage == "uppercase"
    assert list(poll.capabilities.offers) == ["uppercase"]
    assert [(limit.name, limit.maximum) for limit in poll.capabilities.limits] == [("characters", 1_000)]


async def test_its_requests_own_faults_and_tasks_of_other_stages_are_distinguished(gateway: FakeGateway) -> None:
    await gateway.offer(shout(""), task_named("jobs/b/tasks/1"))
    async with working(gateway, UppercaseStage()):
        await gateway.until(lambda: len(gateway.failed) == 2)
    assert gateway.faults(NAME) == ["FAULT_REQUEST"]
    assert gateway.failed[NAME][0].failure.field == "value"
    assert gateway.faults("jobs/b/tasks/1") == ["FAULT_NODE"]
