"""From a failed gRPC call to our error: google.rpc.Status details where there are any, gRPC's own words else."""

from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from fanlight.errors import CallFailed


def to_error(error: grpc.RpcError) -> CallFailed:
    call = cast(grpc.Call, error)
    code = call.code().name
    status = _status_of(call)
    if status is None:
        return CallFailed(call.details() or code, code=code)
    reason, field, retry_after_s = "", "", None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, field = info.reason, info.metadata.get("field", "")
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return CallFailed(status.message or code, code=code, reason=reason, field=field, retry_after_s=retry_after_s)


def _status_of(call: grpc.Call) -> status_pb2.Status | None:
    """None too where something between us and the gateway changed the code and left the details."""
    try:
        return cast(status_pb2.Status | None, rpc_status.from_call(call))
    except ValueError:
        return None
