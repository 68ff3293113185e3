"""A stage that nothing here knows is a request message, a worker, and one entry in the table of stages."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from google.protobuf import any_pb2, wrappers_pb2

from fanlight.channel import open_channel
from fanlight.contract.needs import Needs
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, FanlightError, InvalidField
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app import worker_registry
from services.gateway.http.json_messages import to_json
from services.gateway.ports import CaughtUp
from services.gateway.wire import stages
from services.gateway.wire.stages import StageEntry, one_task
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.fleet import Fleet
from tests.fakes.gateway_process import jobs_of
from tests.fakes.rpc_gateway import serving
from tests.fakes.toy_stage import LENGTH_MAX, UppercaseStage
from tests.fakes.worker import working

UPPERCASE = "uppercase"
PATIENCE_S = 20.0


def needs_of(request: wrappers_pb2.StringValue) -> Needs:
    if not request.value:
        raise InvalidField("is empty; send the text", field="value")
    return Needs(offers=((UPPERCASE, "value"),), amounts=(("characters", len(request.value), "value"),))


@pytest.fixture(autouse=True)
def uppercase(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = StageEntry(
        name=UPPERCASE, request_type=wrappers_pb2.StringValue, draft=one_task(UPPERCASE, needs_of), makes="text"
    )
    monkeypatch.setitem(stages.STAGES, UPPERCASE, entry)


class Address:
    def __init__(self, address: str) -> None:
        self.address = address


@pytest.fixture
async def address(fleet: Fleet) -> AsyncIterator[str]:
    async with serving(fleet) as address:
        yield address


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(address) as channel:
        yield channel


def of_text(value: str) -> gateway_pb2.CreateJobRequest:
    packed = any_pb2.Any()
    packed.Pack(wrappers_pb2.StringValue(value=value))
    return gateway_pb2.CreateJobRequest(request=packed)


async def refusal(channel: grpc.aio.Channel, request: gateway_pb2.CreateJobRequest) -> FanlightError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await jobs_of(channel).CreateJob(request)
    return from_rpc_error(caught.value)


async def come(fleet: Fleet) -> None:
    """Until its worker has said what it can do."""
    async with asyncio.timeout(PATIENCE_S):
        async for change in fleet.store.watch(worker_registry.BUCKET):
            if UPPERCASE in fleet.gateway.workers.offers.catalog().stages and not isinstance(change, CaughtUp):
                return


async def test_its_request_goes_from_a_client_through_a_worker_to_a_result(
    fleet: Fleet, address: str, channel: grpc.aio.Channel
) -> None:
    async with working(Address(address), UppercaseStage()):
        await come(fleet)
        made = await jobs_of(channel).CreateJob(of_text("a fox in the snow"))
        async with asyncio.timeout(PATIENCE_S):
            events = [each async for each in jobs_of(channel).WatchJob(gateway_pb2.WatchJobRequest(name=made.name))]
    job = events[-1].job
    assert job.state == gateway_pb2.Job.STATE_SUCCEEDED
    (output,) = job.images
    blob = await fleet.blobs.stat(output.blob.scope, output.blob.digest)
    assert blob is not None
    data = b"".join([chunk async for chunk in fleet.blobs.read(output.blob.scope, output.blob.digest)])
    assert data == b"A FOX IN THE SNOW"
    assert [(task.stage, task.state) for task in job.tasks] == [(UPPERCASE, gateway_pb2.Task.STATE_SUCCEEDED)]
    asked = wrappers_pb2.StringValue()
    assert job.request.Unpack(asked)
    assert asked.value == "a fox in the snow"
    assert to_json(job)["request"]["value"] == "a fox in the snow"


async def test_its_checks_needs_and_limits_are_those_of_any_stage(
    fleet: Fleet, address: str, channel: grpc.aio.Channel
) -> None:
    error = await refusal(channel, of_text("a fox"))
    assert error.reason == "UNAVAILABLE"
    assert "no uppercase worker is connected" in error.message
    async with working(Address(address), UppercaseStage()):
        await come(fleet)
        error = await refusal(channel, of_text(""))
        assert (type(error), error.field) == (InvalidField, "request.value")
        error = await refusal(channel, of_text("x" * (LENGTH_MAX + 1)))
        assert (type(error), error.field) == (FailedPrecondition, "request.value")
        assert error.message == "needs 1001 characters; node-1 takes 1000"


async def test_a_message_that_no_stage_takes_is_refused_with_those_that_there_are(channel: grpc.aio.Channel) -> None:
    packed = any_pb2.Any()
    packed.Pack(wrappers_pb2.BoolValue(value=True))
    error = await refusal(channel, gateway_pb2.CreateJobRequest(request=packed))
    assert (type(error), error.field) == (InvalidField, "request")
    assert "google.protobuf.BoolValue" in error.message
    assert "fanlight.diffusion.v1.GenerateRequest" in error.message
    assert "google.protobuf.StringValue" in error.message


async def test_bytes_that_are_not_the_message_are_refused(channel: grpc.aio.Channel) -> None:
    packed = any_pb2.Any(type_url="type.googleapis.com/google.protobuf.StringValue", value=b"\x0a\xff")
    error = await refusal(channel, gateway_pb2.CreateJobRequest(request=packed))
    assert (type(error), error.field) == (InvalidField, "request")


async def test_a_generation_may_come_as_any_request_too(fleet: Fleet, channel: grpc.aio.Channel) -> None:
    await fleet.worker("diffusion").come()
    packed = any_pb2.Any()
    packed.Pack(diffusion_pb2.GenerateRequest(prompt="a fox", count=2))
    job = await jobs_of(channel).CreateJob(gateway_pb2.CreateJobRequest(request=packed))
    assert (job.generation.prompt, len(job.tasks)) == ("a fox", 2)
