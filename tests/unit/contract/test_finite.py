"""Numbers that are not finite are refused in any message, by the path of their field."""

import math

import pytest
from google.protobuf.message import Message

from fanlight.common.v1 import common_pb2
from fanlight.contract.finite import MEASUREMENTS, refuse_at_edge, refuse_not_finite
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from tests.fakes.extremes import extremes


def a_job() -> gateway_pb2.CreateJobRequest:
    request = gateway_pb2.CreateJobRequest(deadline_s=1.0)
    request.generation.loras.add(weight=0.5)
    request.generation.controls.add().parameters.update({"low": {"deep": [1, 2.5]}})
    return request


def bad_job() -> gateway_pb2.CreateJobRequest:
    request = a_job()
    request.generation.controls[0].parameters.update({"low": {"deep": [1, math.inf]}})
    return request


def packed() -> gateway_pb2.CreateJobRequest:
    request = gateway_pb2.CreateJobRequest()
    request.request.Pack(bad_job().generation)
    return request


def announced(**values: float) -> queue_pb2.LeaseTasksRequest:
    parameter = preprocessor_pb2.Parameter(name="low", **values)
    annotators = [preprocessor_pb2.Annotator(id="a"), preprocessor_pb2.Annotator(id="b", parameters=[parameter])]
    return queue_pb2.LeaseTasksRequest(capabilities=queue_pb2.Capabilities(annotators=annotators))


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (gateway_pb2.CreateJobRequest(deadline_s=math.nan), "deadline_s"),
        (diffusion_pb2.GenerateRequest(loras=[{}, {"weight": -math.inf}]), "loras[1].weight"),  # type: ignore[list-item]
        (bad_job(), "generation.controls[0].parameters.low.deep[1]"),
        (packed(), "request.controls[0].parameters.low.deep[1]"),
        (gateway_pb2.CreateJobsRequest(requests=[a_job(), bad_job()]), "requests[1].generation.controls[0]"),
        (announced(minimum=math.nan), "capabilities.annotators[1].parameters[0].minimum"),
        (queue_pb2.LeaseTasksRequest(wait_s=math.inf), "wait_s"),
    ],
)
def test_the_first_number_that_is_not_finite_is_named(message: Message, path: str) -> None:
    with pytest.raises(InvalidField, match="is not a finite number") as caught:
        refuse_not_finite(message)
    assert caught.value.field.startswith(path)


def test_finite_numbers_and_what_cannot_be_read_pass() -> None:
    unknown = gateway_pb2.CreateJobRequest()
    unknown.request.type_url, unknown.request.value = "type.googleapis.com/none.None", b"\xff"
    torn = packed()
    torn.request.value = torn.request.value[:-1]
    for message in (a_job(), announced(minimum=1e308), unknown, torn):
        refuse_not_finite(message)


def test_a_measurement_is_for_its_reader_to_judge() -> None:
    fetch = common_pb2.FetchProgress(goodput_bps=math.nan, seconds_left=math.inf)
    span = common_pb2.Span(name="load", duration_s=math.nan)
    refuse_not_finite(queue_pb2.CompleteTaskRequest(spans=[span]))
    refuse_not_finite(queue_pb2.RenewLeasesRequest(renewals=[queue_pb2.Renewal(progress={"fetch": fetch})]))


@pytest.mark.parametrize(
    "kind", [queue_pb2.LeaseTasksRequest, queue_pb2.RenewLeasesRequest, queue_pb2.CompleteTaskRequest]
)
def test_every_other_number_of_a_worker_is_refused_at_the_edge(kind: type[Message]) -> None:
    for each in extremes(kind()):
        if each.is_infinite and each.name not in MEASUREMENTS:
            with pytest.raises(InvalidField) as caught:
                refuse_at_edge(each.message)
            assert caught.value.field == each.path
        else:
            refuse_at_edge(each.message)


def test_each_request_of_a_batch_is_left_to_be_refused_by_itself() -> None:
    refuse_at_edge(gateway_pb2.CreateJobsRequest(requests=[bad_job()]))
