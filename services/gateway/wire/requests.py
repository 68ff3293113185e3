"""Clients' requests: protobuf to domain, every field checked."""

import hashlib
from collections.abc import Iterable
from urllib.parse import urlsplit

from google.protobuf import timestamp_pb2
from google.protobuf.message import DecodeError, EncodeError, Message

from fanlight.common.v1 import common_pb2
from fanlight.contract.finite import refuse_not_finite
from fanlight.contract.images import images_of
from fanlight.contract.limits import (
    BATCH_JOBS_LIMIT,
    DEADLINE_LIMIT_S,
    PRIORITY_LIMIT,
    REQUEST_ID_CHARACTERS_LIMIT,
    WEBHOOK_URL_LIMIT_BYTES,
    check_bytes,
    check_number,
    check_whole,
)
from fanlight.contract.names import DEFAULT_SCOPE, parse_scope
from fanlight.contract.needs import refuse_unknown_fields
from fanlight.errors import FanlightError, InvalidField
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.jobs import JobFilter
from services.gateway.app.submission import NewJob
from services.gateway.domain.job import JobState
from services.gateway.wire.needs import Fleet
from services.gateway.wire.stages import draft_of

_STATES = {
    gateway_pb2.Job.STATE_QUEUED: JobState.QUEUED,
    gateway_pb2.Job.STATE_RUNNING: JobState.RUNNING,
    gateway_pb2.Job.STATE_SUCCEEDED: JobState.SUCCEEDED,
    gateway_pb2.Job.STATE_FAILED: JobState.FAILED,
    gateway_pb2.Job.STATE_CANCELLED: JobState.CANCELLED,
}


def new_job(request: gateway_pb2.CreateJobRequest, fleet: Fleet) -> NewJob:
    """InvalidField and NotFound name the field; Unavailable when no worker was ever seen for a stage it needs."""
    if len(request.request_id) > REQUEST_ID_CHARACTERS_LIMIT:
        raise InvalidField(
            f"has {len(request.request_id)} characters; at most {REQUEST_ID_CHARACTERS_LIMIT}", field="request_id"
        )
    _refuse_newer(request, request.WhichOneof("work") or "request")
    new = NewJob(
        draft=draft_of(request, fleet),
        content_digest=_content_digest(request),
        request_id=request.request_id,
        priority=check_whole(request.priority, -PRIORITY_LIMIT, PRIORITY_LIMIT, field="priority"),
        deadline_s=check_number(request.deadline_s, 0.0, DEADLINE_LIMIT_S, field="deadline_s"),
        webhook_url=_webhook_url(request.webhook_url),
        pool=parse_scope(request.pool, field="pool") if request.pool else "",
    )
    # The contract has refused these with their ranges. One that it forgot must not reach a record.
    refuse_not_finite(request)
    return new


def _content_digest(request: gateway_pb2.CreateJobRequest) -> str:
    """Equal for requests that mean the same: of a blob only the scope and the digest count."""
    try:
        plain = gateway_pb2.CreateJobRequest.FromString(request.SerializeToString())
    except (DecodeError, EncodeError) as error:
        raise InvalidField("is nested too deeply", field=request.WhichOneof("work") or "request") from error
    for blob in (image.blob for _, image in images_of(plain) if image.HasField("blob")):
        blob.CopyFrom(common_pb2.Blob(scope=blob.scope or DEFAULT_SCOPE, digest=blob.digest))
    return hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest()


def _webhook_url(url: str) -> str:
    """Checks the address alone; where it leads is checked when it is called."""
    check_bytes(url, WEBHOOK_URL_LIMIT_BYTES, field="webhook_url")
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidField("must be an http or https URL", field="webhook_url")
    if parts.username is not None or parts.password is not None:
        raise InvalidField("must not contain a user or a password", field="webhook_url")
    return url


def _refuse_newer(message: Message, but: str) -> None:
    """Refuses unknown fields of the message itself. Those inside the field `but` go to the workers."""
    own = type(message)()
    own.CopyFrom(message)
    own.ClearField(but)
    refuse_unknown_fields(own)


def new_jobs(request: gateway_pb2.CreateJobsRequest, fleet: Fleet) -> list[NewJob | FanlightError]:
    """Each new job, or the error of its request. InvalidField for no requests or too many."""
    check_batch(len(request.requests))
    _refuse_newer(request, "requests")
    return new_or_refused(request.requests, fleet)


def check_batch(count: int) -> None:
    if not 1 <= count <= BATCH_JOBS_LIMIT:
        raise InvalidField(f"has {count} entries; must be 1 to {BATCH_JOBS_LIMIT}", field="requests")


def new_or_refused(
    asked: Iterable[gateway_pb2.CreateJobRequest | FanlightError], fleet: Fleet
) -> list[NewJob | FanlightError]:
    """Each new job, or the error of its request; what was refused already stays refused."""
    return [each if isinstance(each, FanlightError) else _new_or_refused(each, fleet) for each in asked]


def _new_or_refused(request: gateway_pb2.CreateJobRequest, fleet: Fleet) -> NewJob | FanlightError:
    try:
        return new_job(request, fleet)
    except FanlightError as error:
        return error


def only(request: gateway_pb2.ListJobsRequest) -> JobFilter:
    return JobFilter(
        state=job_state(request.state),
        model=request.model,
        annotator=request.annotator,
        tenant=request.tenant,
        created_from_s=_seconds(request.created_from_time),
        created_before_s=_seconds(request.created_before_time),
    )


def _seconds(time: timestamp_pb2.Timestamp) -> float:
    """0 where it is absent."""
    return time.seconds + time.nanos / 1e9


def job_state(state: "gateway_pb2.Job.State.ValueType") -> JobState | None:
    """None for unspecified."""
    if state == gateway_pb2.Job.STATE_UNSPECIFIED:
        return None
    if state not in _STATES:
        raise InvalidField(f"is {state}, which is not a state of a job", field="state")
    return _STATES[state]
