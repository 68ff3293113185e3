"""Our errors on the wire and back: google.rpc.Status with details for gRPC, a status and a body for HTTP.

Also finds the string that makes a protobuf message unreadable. Knows no server and no call.
"""

from typing import Any, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from fanlight import errors

DOMAIN = "fanlight"
_LENGTH_DELIMITED = 2

# Error class: (google.rpc code, HTTP status). A subclass that is not listed has its base's row.
_WIRE: dict[type[errors.FanlightError], tuple[int, int]] = {
    errors.FanlightError: (code_pb2.INTERNAL, 500),
    errors.InvalidField: (code_pb2.INVALID_ARGUMENT, 400),
    errors.NotFound: (code_pb2.NOT_FOUND, 404),
    errors.AlreadyExists: (code_pb2.ALREADY_EXISTS, 409),
    errors.FailedPrecondition: (code_pb2.FAILED_PRECONDITION, 409),
    errors.OutOfRange: (code_pb2.OUT_OF_RANGE, 416),
    errors.TooLarge: (code_pb2.RESOURCE_EXHAUSTED, 413),
    errors.ResourceExhausted: (code_pb2.RESOURCE_EXHAUSTED, 429),
    errors.Unauthenticated: (code_pb2.UNAUTHENTICATED, 401),
    errors.PermissionDenied: (code_pb2.PERMISSION_DENIED, 403),
    errors.ContentBlocked: (code_pb2.PERMISSION_DENIED, 403),
    errors.LeaseLost: (code_pb2.ABORTED, 409),
    errors.Conflict: (code_pb2.ABORTED, 409),
    errors.Unavailable: (code_pb2.UNAVAILABLE, 503),
    errors.ModerationUnavailable: (code_pb2.UNAVAILABLE, 503),
    errors.DeadlineExceeded: (code_pb2.DEADLINE_EXCEEDED, 504),
    errors.Cancelled: (code_pb2.CANCELLED, 499),
    errors.NodeFault: (code_pb2.INTERNAL, 500),
    errors.ResultRefused: (code_pb2.INTERNAL, 500),
}

_BY_REASON = {error.reason: error for error in _WIRE}

# The nearest error of ours for a peer that sends plain gRPC statuses, and for gRPC's own.
_BY_CODE: dict[int, type[errors.FanlightError]] = {
    code_pb2.INVALID_ARGUMENT: errors.InvalidField,
    code_pb2.NOT_FOUND: errors.NotFound,
    code_pb2.ALREADY_EXISTS: errors.AlreadyExists,
    code_pb2.FAILED_PRECONDITION: errors.FailedPrecondition,
    code_pb2.OUT_OF_RANGE: errors.OutOfRange,
    code_pb2.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    code_pb2.UNAUTHENTICATED: errors.Unauthenticated,
    code_pb2.PERMISSION_DENIED: errors.PermissionDenied,
    code_pb2.ABORTED: errors.Conflict,
    code_pb2.UNAVAILABLE: errors.Unavailable,
    code_pb2.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    code_pb2.CANCELLED: errors.Cancelled,
}


def _row(error: errors.FanlightError) -> tuple[int, int]:
    return next(_WIRE[kind] for kind in type(error).__mro__ if kind in _WIRE)


def http_status(error: errors.FanlightError) -> int:
    return _row(error)[1]


def to_status(error: errors.FanlightError) -> status_pb2.Status:
    """ErrorInfo always; BadRequest if a field is named; RetryInfo if a retry may help."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=DOMAIN, metadata={"field": error.field} if error.field else {}
        )
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=_row(error)[0], message=_message(error), details=[_packed(d) for d in details])


def _message(error: errors.FanlightError) -> str:
    return f"{error.field}: {error.message}" if error.field else error.message


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def from_rpc_error(error: grpc.RpcError) -> errors.FanlightError:
    """The error that the peer raised, or the nearest one to what gRPC itself reports."""
    call = cast(grpc.Call, error)
    status = rpc_status.from_call(call)
    if status is None:
        return _of_code(call.code().value[0], call.details() or call.code().name)
    reason, field, retry_after_s = "", "", None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, field = info.reason, info.metadata.get("field", "")
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    # A reason of a newer peer, or of one room's own.
    kind = _BY_REASON.get(reason) or _BY_CODE.get(status.code, errors.NodeFault)
    message = status.message.removeprefix(f"{field}: ") if field else status.message
    return kind(message, field=field, retry_after_s=retry_after_s)


def of_reason(reason: str, message: str, *, field: str = "") -> errors.FanlightError:
    """The error that a failure's reason names; NodeFault if the reason is not one of ours."""
    return _BY_REASON.get(reason, errors.NodeFault)(message, field=field)


def _of_code(code: int, message: str) -> errors.FanlightError:
    return _BY_CODE.get(code, errors.NodeFault)(message, field="")


def to_body(error: errors.FanlightError) -> dict[str, dict[str, object]]:
    """The JSON body of an HTTP response."""
    body: dict[str, object] = {"reason": error.reason, "message": error.message}
    if error.field:
        body["field"] = error.field
    if error.retry_after_s is not None:
        body["retry_after_s"] = error.retry_after_s
    return {"error": body}


def find_broken_string(descriptor: Descriptor, data: bytes) -> str:
    """The path of the first string field that is not UTF-8, such as `generation.prompt`; empty if there is none.

    Reads the bytes by the message's descriptor, after parsing them has failed.
    """
    try:
        # Iterable by its sequence protocol, which its type stub does not say.
        fields: Any = UnknownFieldSet(Empty.FromString(data))
    except DecodeError:
        return ""
    counts: dict[int, int] = {}
    for found in fields:
        field = descriptor.fields_by_number.get(found.field_number)
        index = counts.get(found.field_number, 0)
        counts[found.field_number] = index + 1
        if field is None or found.wire_type != _LENGTH_DELIMITED:
            continue
        if path := _broken_string_in(field, found.data, index):
            return path
    return ""


def _broken_string_in(field: FieldDescriptor, data: bytes, index: int) -> str:
    name = f"{field.name}[{index}]" if field.is_repeated else field.name
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            data.decode()
        except UnicodeDecodeError:
            return name
    elif field.message_type is not None and (rest := find_broken_string(field.message_type, data)):
        return f"{name}.{rest}"
    return ""
