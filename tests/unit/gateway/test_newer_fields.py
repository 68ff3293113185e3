"""Fields newer than the gateway's contract, over gRPC: kept for a worker whose contract knows them, or refused."""

from collections.abc import AsyncIterator
from typing import TypeVar

import grpc.aio
import pytest
from google.protobuf.message import Message

from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.fleet import Fleet, photo
from tests.fakes.gateway_process import RpcWorker, jobs_of
from tests.fakes.rpc_gateway import serving

GENERATE, CONTROL = "fanlight.diffusion.v1.GenerateRequest", "fanlight.diffusion.v1.Control"
ANNOTATE, IMAGE = "fanlight.preprocessor.v1.AnnotateRequest", "fanlight.common.v1.ImageSource"
# Newer than those of today, and no farther ahead than a gateway believes a worker.
NEWER = 77
ABSURD = b"a field of tomorrow"

M = TypeVar("M", bound=Message)


def with_field(message: M, number: int, text: bytes = ABSURD) -> M:
    """With a field that the message of today does not have."""
    key = number << 3 | 2
    tag = bytes([key & 127 | 128, key >> 7]) if key > 127 else bytes([key])
    return type(message).FromString(message.SerializeToString() + tag + bytes([len(text)]) + text)


def knowing(*messages: str, last_field: int = NEWER) -> queue_pb2.ContractRevision:
    known = [queue_pb2.KnownMessage(name=name, last_field=last_field) for name in messages]
    return queue_pb2.ContractRevision(revision=3, messages=known)


def of_generation(request: diffusion_pb2.GenerateRequest) -> gateway_pb2.CreateJobRequest:
    return gateway_pb2.CreateJobRequest(generation=request)


def plain(**fields: object) -> diffusion_pb2.GenerateRequest:
    return diffusion_pb2.GenerateRequest(**{"prompt": "a fox", **fields})


@pytest.fixture
async def channel(fleet: Fleet) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(fleet) as address, open_channel(address) as channel:
        yield channel


@pytest.fixture
async def old(channel: grpc.aio.Channel) -> RpcWorker:
    """Diffusion, beside it an annotator; both know what the gateway knows."""
    await RpcWorker(channel, PREPROCESS, "old").lease(limit=0)
    worker = RpcWorker(channel, DIFFUSION, "old")
    await worker.lease(limit=0)
    return worker


async def newer(channel: grpc.aio.Channel, *messages: str, stage: str = DIFFUSION, **known: int) -> RpcWorker:
    worker = RpcWorker(channel, stage, "new", contract=knowing(*messages, **known))
    await worker.lease(limit=0)
    return worker


async def refusal(channel: grpc.aio.Channel, request: gateway_pb2.CreateJobRequest) -> FanlightError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await jobs_of(channel).CreateJob(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidField)
    return error


async def test_a_field_that_no_worker_knows_is_refused_by_number_and_message(
    channel: grpc.aio.Channel, old: RpcWorker
) -> None:
    error = await refusal(channel, of_generation(with_field(plain(), 99)))
    assert error.field == "generation.99"
    assert f"field 99 of {GENERATE}" in error.message


async def test_a_field_goes_to_the_worker_that_knows_it_and_stays_in_the_request(
    channel: grpc.aio.Channel, old: RpcWorker
) -> None:
    new = await newer(channel, GENERATE)
    job = await jobs_of(channel).CreateJob(of_generation(with_field(plain(seed=7), NEWER)))
    assert await old.lease() == []
    (task,) = await new.lease()
    assert ABSURD in task.request.value
    request = diffusion_pb2.GenerateRequest()
    assert task.request.Unpack(request)
    assert request == with_field(request_without(request), NEWER), "once, as it was sent"
    assert (request.prompt, request.seed) == ("a fox", 7)
    assert ABSURD in job.generation.SerializeToString()


def request_without(request: M) -> M:
    """Without the fields that are not known."""
    copy = type(request)()
    copy.CopyFrom(request)
    copy.DiscardUnknownFields()
    return copy


async def test_a_worker_that_knows_fewer_new_fields_is_not_enough(channel: grpc.aio.Channel, old: RpcWorker) -> None:
    await newer(channel, GENERATE, last_field=NEWER - 1)
    error = await refusal(channel, of_generation(with_field(plain(), NEWER)))
    assert error.field == f"generation.{NEWER}"


async def test_the_same_number_in_another_message_is_another_field(channel: grpc.aio.Channel, old: RpcWorker) -> None:
    await newer(channel, CONTROL)
    error = await refusal(channel, of_generation(with_field(plain(), NEWER)))
    assert f"field {NEWER} of {GENERATE}" in error.message


async def test_a_field_of_a_control_is_kept_beside_the_image_that_its_annotator_makes(
    channel: grpc.aio.Channel, old: RpcWorker
) -> None:
    control = with_field(diffusion_pb2.Control(image=photo(), annotator="canny"), 40)
    error = await refusal(channel, of_generation(plain(controls=[control])))
    assert (error.field, f"field 40 of {CONTROL}" in error.message) == ("generation.controls[0].40", True)
    new = await newer(channel, CONTROL)
    await jobs_of(channel).CreateJob(of_generation(plain(controls=[control])))
    assert await RpcWorker(channel, PREPROCESS, "old").work() == 1
    assert await old.lease() == []
    (task,) = await new.lease()
    request = diffusion_pb2.GenerateRequest()
    assert task.request.Unpack(request)
    assert ABSURD in request.controls[0].SerializeToString()
    assert request.controls[0].made_by.annotator == "canny"


async def test_a_field_of_an_image_is_kept_beside_its_blob(channel: grpc.aio.Channel, old: RpcWorker) -> None:
    image = with_field(photo(), 30)
    annotation = preprocessor_pb2.AnnotateRequest(annotator="canny", image=image)
    error = await refusal(channel, gateway_pb2.CreateJobRequest(annotation=annotation))
    assert (error.field, f"field 30 of {IMAGE}" in error.message) == ("annotation.image.30", True)
    new = await newer(channel, IMAGE, stage=PREPROCESS)
    await jobs_of(channel).CreateJob(gateway_pb2.CreateJobRequest(annotation=annotation))
    assert await RpcWorker(channel, PREPROCESS, "old").lease() == []
    (task,) = await new.lease()
    request = preprocessor_pb2.AnnotateRequest()
    assert task.request.Unpack(request)
    assert request.image == with_field(common_pb2.ImageSource(blob=request.image.blob), 30)


async def test_a_field_of_the_request_for_the_job_itself_is_refused(channel: grpc.aio.Channel, old: RpcWorker) -> None:
    """No worker ever sees it, whatever it knows."""
    await newer(channel, "fanlight.gateway.v1.CreateJobRequest")
    error = await refusal(channel, with_field(of_generation(plain()), 60))
    assert (error.field, "field 60 of fanlight.gateway.v1.CreateJobRequest" in error.message) == ("60", True)


async def test_in_a_batch_only_the_newer_one_is_refused(channel: grpc.aio.Channel, old: RpcWorker) -> None:
    batch = [of_generation(plain()), of_generation(with_field(plain(), 99))]
    answer = await jobs_of(channel).CreateJobs(gateway_pb2.CreateJobsRequest(requests=batch))
    assert [each.WhichOneof("result") for each in answer.results] == ["job", "failure"]
    assert answer.results[1].failure.field == "generation.99"


async def test_a_field_of_the_batch_itself_is_refused(channel: grpc.aio.Channel, old: RpcWorker) -> None:
    batch = with_field(gateway_pb2.CreateJobsRequest(requests=[of_generation(plain())]), 60)
    with pytest.raises(grpc.aio.AioRpcError, match=r"field 60 of fanlight\.gateway\.v1\.CreateJobsRequest"):
        await jobs_of(channel).CreateJobs(batch)
