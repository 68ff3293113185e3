"""Errors survive the way over gRPC and become the right status for HTTP."""

import grpc.aio
import pytest
from google.rpc import code_pb2, error_details_pb2

from fanlight import errors
from services.kernel.errors_wire import from_rpc_error, http_status, to_body, to_status

# What clients raise of themselves, and no service sends.
CLIENTS_OWN = (errors.CallFailed, errors.JobFailed, errors.InvalidInput, errors.BrokenBlob)


def all_errors() -> list[errors.FanlightError]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    kinds = [kind for kind in kinds if kind not in CLIENTS_OWN]
    return [kind("is wrong", field="controls[0].annotator") for kind in kinds]


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: type(error).__name__)
def test_every_error_comes_back_as_what_it_was(error):
    status = to_status(error)
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    call = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=status.message)

    again = from_rpc_error(call)

    assert type(again) is type(error)
    assert (again.message, again.field) == ("is wrong", "controls[0].annotator")


def test_a_field_error_carries_bad_request_details():
    status = to_status(errors.InvalidField("must be 1 to 150", field="steps"))

    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert bad_request.field_violations[0].field == "steps"
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert status.message == "steps: must be 1 to 150"


@pytest.mark.parametrize("letter", ["x", "é", "木", "🌳"])
def test_an_error_that_quotes_megabytes_still_fits_the_trailers(letter):
    error = errors.InvalidField(f"is {letter * 1_000_000}", field=f"parameters.{letter * 1_000_000}")

    status = to_status(error.within("annotate"))

    percent_encoded = 3 * len(status.message.encode())
    base64 = 4 / 3 * len(status.SerializeToString())
    assert percent_encoded + base64 < 8 * 1024
    assert status.message.startswith(f"annotate.parameters.{letter}")


def test_a_message_of_ordinary_length_is_not_touched():
    assert errors.NotFound("木" * 266).message == "木" * 266


def test_a_retry_delay_travels():
    status = to_status(errors.ResourceExhausted("full", retry_after_s=2.5))

    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() == 2500


def test_an_error_of_plain_grpc_becomes_the_nearest_of_ours():
    call = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details="connection refused"
    )

    assert type(from_rpc_error(call)) is errors.Unavailable


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidField("x", field="f"), 400),
        (errors.Unauthenticated("x"), 401),
        (errors.NotFound("x"), 404),
        (errors.TooLarge("x"), 413),
        (errors.ResourceExhausted("x"), 429),
        (errors.FanlightError("x"), 500),
        (errors.Unavailable("x"), 503),
    ],
)
def test_http_statuses(error, status):
    assert http_status(error) == status


def test_an_http_body_says_reason_message_and_field():
    assert to_body(errors.InvalidField("must be 1 to 150", field="steps")) == {
        "error": {"reason": "INVALID_FIELD", "message": "must be 1 to 150", "field": "steps"}
    }


def test_an_error_within_a_message_names_the_whole_path():
    error = errors.InvalidField("is empty", field="annotator").within("controls[1]").within("generation")

    assert error.field == "generation.controls[1].annotator"
