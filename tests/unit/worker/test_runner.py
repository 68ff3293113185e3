"""What becomes of one leased task: its request, its images, its result, its failure."""

import pytest
import structlog.testing
from google.protobuf import wrappers_pb2

from fanlight.contract.limits import PROVENANCE_LIMIT_BYTES
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import (
    FailedPrecondition,
    FanlightError,
    InvalidField,
    NodeFault,
    NotFound,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.weights.errors import TokenRefused
from tests.fakes.scripted_gateway import CHUNK_BYTES, FakeGateway
from tests.fakes.stage import FakeStage
from tests.fakes.worker import task_named, task_of, working

NAME = "jobs/a/tasks/1"
IMAGE = bytes(range(256)) * 1024


async def test_input_images_arrive_as_bytes(gateway: FakeGateway, stage: FakeStage) -> None:
    await gateway.offer(task_named(NAME, blob=gateway.keep(IMAGE)))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results[NAME] == 1)
    assert stage.images[NAME] == IMAGE


async def test_an_image_is_fetched_once_for_several_tasks(gateway: FakeGateway, stage: FakeStage) -> None:
    blob = gateway.keep(IMAGE)
    await gateway.offer(*(task_named(f"jobs/{n}/tasks/1", blob=blob) for n in range(4)))
    async with working(gateway, stage, slots=2):
        await gateway.until(lambda: len(gateway.completed) == 4)
    assert gateway.calls["ReadBlob"] == 1
    assert set(stage.images.values()) == {IMAGE}


async def test_a_fetch_that_was_cut_goes_on_where_it_ended(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.cuts = 2
    await gateway.offer(task_named(NAME, blob=gateway.keep(IMAGE)))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results[NAME] == 1)
    assert gateway.read_offsets == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert stage.images[NAME] == IMAGE


async def test_a_corrupted_image_never_reaches_the_stage(gateway: FakeGateway, stage: FakeStage) -> None:
    blob = gateway.keep(IMAGE)
    gateway.corrupt.add(blob.digest)
    await gateway.offer(task_named(NAME, blob=blob))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
    assert NAME not in stage.images


async def test_an_image_that_the_gateway_lost_is_not_the_requests_fault(gateway: FakeGateway, stage: FakeStage) -> None:
    blob = gateway.keep(IMAGE)
    gateway.blobs.clear()
    await gateway.offer(task_named(NAME, blob=blob))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])


async def test_an_image_above_the_limit_is_refused_unfetched(gateway: FakeGateway, stage: FakeStage) -> None:
    blob = gateway.keep(bytes(2 * 1024 * 1024))
    await gateway.offer(task_named(NAME, blob=blob))
    async with working(gateway, stage, limits={"input_bytes_max": 1024 * 1024}):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
    assert gateway.failed[NAME][0].failure.reason == "TOO_LARGE"
    assert gateway.calls["ReadBlob"] == 0


async def test_what_was_fetched_tells_how_fast_the_link_is(gateway: FakeGateway, stage: FakeStage) -> None:
    await gateway.offer(task_named(NAME, blob=gateway.keep(IMAGE)))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results[NAME] == 1 and gateway.open_polls == 1)
        assert gateway.polls[0].worker.goodput_bps == 0
        assert gateway.polls[-1].worker.goodput_bps > 0


@pytest.mark.parametrize("method", ["WriteBlob", "CompleteTask"])
async def test_a_result_whose_answer_was_lost_is_handed_in_again(
    gateway: FakeGateway, stage: FakeStage, method: str
) -> None:
    gateway.lost_answers[method] = 2
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results[NAME] == 1 and gateway.open_polls == 1)
    assert gateway.results[NAME] == 1
    assert gateway.faults(NAME) == []


async def test_an_output_that_arrived_is_not_sent_twice(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.lost_answers["WriteBlob"] = 1
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results[NAME] == 1)
    assert gateway.calls["WriteBlob"] == 1


async def test_an_output_that_the_gateway_dropped_is_sent_again(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.refusals["CompleteTask"] = 1
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage, limits={"retry_delay_max_s": 0.5}):
        await gateway.until(lambda: gateway.calls["CompleteTask"] == 1)
        gateway.blobs.clear()
        await gateway.until(lambda: gateway.results[NAME] == 1)
    assert gateway.calls["WriteBlob"] == 2


async def test_a_result_that_the_gateway_refuses_is_not_the_requests_fault(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    stage.outputs = []
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
    failure = gateway.failed[NAME][0].failure
    assert (failure.reason, failure.field) == ("RESULT_REFUSED", "outputs")
    assert "has 0 entries; a task has one output" in failure.message


async def test_a_result_above_a_limit_of_the_gateway_is_refused_by_its_field(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    stage.provenance = "x" * (PROVENANCE_LIMIT_BYTES + 1)
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
    failure = gateway.failed[NAME][0].failure
    assert (failure.reason, failure.field) == ("RESULT_REFUSED", "outputs[0].provenance_json")
    assert gateway.calls["CompleteTask"] == 1


async def test_what_a_stage_warns_of_is_handed_in_with_its_output(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.warnings = ["two layers of the LoRA do not fit"]
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results[NAME] == 1)
    [completed] = gateway.completed.values()
    assert list(completed.outputs[0].warnings) == stage.warnings


async def test_an_attempt_that_the_gateway_has_ended_itself_is_one_line_in_the_log_and_no_further_call(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    gateway.refused_results = 1
    await gateway.offer(task_named(NAME), task_named("jobs/b/tasks/1"))
    with structlog.testing.capture_logs() as logs:
        async with working(gateway, stage, slots=1):
            await gateway.until(lambda: gateway.results["jobs/b/tasks/1"] == 1)
    assert gateway.calls["FailTask"] == 0
    # The fake gateway logs here too: it has no direct uploads.
    loud = [each for each in logs if each["log_level"] != "info" and each["event"] != "handler_failed"]
    assert [(each["event"], each["field"], each["message"]) for each in loud] == [
        ("result_refused", "outputs[0].blob", "is no image")
    ]


async def test_a_result_that_never_arrives_is_a_fault_of_the_node(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.refusals["CompleteTask"] = 1_000_000
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage, limits={"hand_in_limit_s": 0.1}):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
    assert gateway.failed[NAME][0].failure.reason == "NODE_FAULT"


async def test_large_outputs_go_up_in_chunks(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.outputs = [bytes(6 * 1024 * 1024), b"a second one"]
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.results[NAME] == 1)
    assert sorted(map(len, gateway.blobs.values())) == [12, 6 * 1024 * 1024]


async def test_a_request_at_fault_fails_for_good_and_names_the_field(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.failures[NAME] = InvalidField("at least 1", field="parameters.low")
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_REQUEST"])
    failure = gateway.failed[NAME][0].failure
    assert (failure.reason, failure.message, failure.field) == ("INVALID_FIELD", "at least 1", "parameters.low")


@pytest.mark.parametrize(
    "error", [NodeFault, FailedPrecondition, TooLarge, NotFound, ResourceExhausted, Unavailable, TokenRefused]
)
async def test_what_is_not_here_lets_the_task_run_elsewhere(
    gateway: FakeGateway, stage: FakeStage, error: type[FanlightError]
) -> None:
    stage.failures[NAME] = error("is not here", field="annotator")
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
    failure = gateway.failed[NAME][0].failure
    assert (failure.reason, failure.message, failure.field) == (error.reason, "is not here", "annotator")


def newer(number: int) -> preprocessor_pb2.AnnotateRequest:
    """A request with a field that this revision of the contract does not have."""
    request = preprocessor_pb2.AnnotateRequest(annotator="canny")
    # A varint of the field, set to 1.
    tag = number << 3
    request.MergeFromString(bytes((tag & 0x7F | 0x80, tag >> 7, 1)))
    return request


def broken() -> queue_pb2.LeasedTask:
    task = task_named(NAME)
    task.request.value = b"\xff"
    return task


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (queue_pb2.LeasedTask(name=NAME), "no request"),
        (task_of(diffusion_pb2.GenerateRequest(prompt="a fox"), NAME), "fanlight.diffusion.v1.GenerateRequest"),
        (task_of(wrappers_pb2.StringValue(value="a fox"), NAME), "google.protobuf.StringValue"),
        (broken(), "cannot be read"),
        (task_of(newer(500), NAME), "field 500 of fanlight.preprocessor.v1.AnnotateRequest is newer"),
    ],
)
async def test_a_task_that_this_worker_does_not_understand_runs_elsewhere(
    gateway: FakeGateway, stage: FakeStage, task: queue_pb2.LeasedTask, message: str
) -> None:
    await gateway.offer(task)
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
    failure = gateway.failed[NAME][0].failure
    assert failure.reason == "UNKNOWN_TASK"
    assert message in failure.message
    assert NAME not in stage.images


async def test_an_unknown_error_shows_nothing_of_itself_and_the_worker_goes_on(
    gateway: FakeGateway, stage: FakeStage
) -> None:
    stage.failures[NAME] = RuntimeError("/home/secret: a prompt")
    await gateway.offer(task_named(NAME), task_named("jobs/b/tasks/1"))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])
        await gateway.until(lambda: gateway.results["jobs/b/tasks/1"] == 1)
    failure = gateway.failed[NAME][0].failure
    assert failure.reason == "INTERNAL"
    assert "secret" not in str(failure)


async def test_a_failure_whose_answer_was_lost_is_reported_again(gateway: FakeGateway, stage: FakeStage) -> None:
    stage.failures[NAME] = NodeFault("out of memory")
    gateway.refusals["FailTask"] = 2
    await gateway.offer(task_named(NAME))
    async with working(gateway, stage):
        await gateway.until(lambda: gateway.faults(NAME) == ["FAULT_NODE"])


async def test_a_slot_is_free_again_while_a_result_goes_up(gateway: FakeGateway, stage: FakeStage) -> None:
    gateway.refusals["WriteBlob"] = 1_000_000
    await gateway.offer(task_named(NAME), task_named("jobs/b/tasks/1"), task_named("jobs/c/tasks/1"))
    async with working(gateway, stage):
        await gateway.until(lambda: len(gateway.leased) == 2)
        await stage.until(lambda: {NAME, "jobs/b/tasks/1"} <= set(stage.images))
        tries = gateway.calls["WriteBlob"]
        await gateway.until(lambda: gateway.calls["WriteBlob"] > tries + 10)
        assert len(gateway.waiting) == 1
        gateway.refusals.clear()
        await gateway.until(lambda: len(gateway.completed) == 3)
