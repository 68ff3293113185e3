"""What clients ask for: protobuf to domain, every field checked."""

import hashlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from google.protobuf import timestamp_pb2

from fanlight.common.v1 import common_pb2
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.filters import Only
from services.gateway.app.new_job import NewAnnotation, NewJob, NewWork
from services.gateway.jobs.model import PREPROCESS, JobState
from services.gateway.jobs.workers import Catalog
from services.gateway.wire import fields, parameters
from services.gateway.wire.catalog import annotator_of, require_stage
from services.gateway.wire.generations import new_generation
from services.gateway.wire.pictures import picture
from services.kernel.digests import DEFAULT_SCOPE
from services.kernel.errors import FanlightError, InvalidField

REQUEST_ID_LIMIT = 128
PRIORITY_LIMIT = 100
DEADLINE_LIMIT_S = 30 * 86_400.0
URL_LIMIT_BYTES = 2_048
BATCH_LIMIT = 100
MIN_SIDE_PX, MAX_SIDE_PX = 16, 8192

_STATES = {
    gateway_pb2.Job.STATE_QUEUED: JobState.QUEUED,
    gateway_pb2.Job.STATE_RUNNING: JobState.RUNNING,
    gateway_pb2.Job.STATE_SUCCEEDED: JobState.SUCCEEDED,
    gateway_pb2.Job.STATE_FAILED: JobState.FAILED,
    gateway_pb2.Job.STATE_CANCELLED: JobState.CANCELLED,
}


def new_job(request: gateway_pb2.CreateJobRequest, catalog: Catalog) -> NewJob:
    """InvalidField and NotFound name the field; Unavailable when no worker was ever seen for a stage it needs."""
    if len(request.request_id) > REQUEST_ID_LIMIT:
        raise InvalidField(f"has {len(request.request_id)} characters; at most {REQUEST_ID_LIMIT}", field="request_id")
    return NewJob(
        work=_work(request, catalog),
        content_digest=_content_digest(request),
        request_id=request.request_id,
        priority=fields.whole(request.priority, -PRIORITY_LIMIT, PRIORITY_LIMIT, field="priority"),
        deadline_s=fields.number(request.deadline_s, 0.0, DEADLINE_LIMIT_S, field="deadline_s"),
        webhook_url=_webhook_url(request.webhook_url),
    )


def _content_digest(request: gateway_pb2.CreateJobRequest) -> str:
    """The same for requests that mean the same: what a request tells of a blob beside its digest is ignored."""
    plain = gateway_pb2.CreateJobRequest.FromString(request.SerializeToString())
    for blob in (each.blob for each in _pictures(plain) if each.HasField("blob")):
        blob.CopyFrom(common_pb2.Blob(scope=blob.scope or DEFAULT_SCOPE, digest=blob.digest))
    return hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest()


def _pictures(request: gateway_pb2.CreateJobRequest) -> Iterator[common_pb2.Picture]:
    if request.HasField("annotation"):
        yield request.annotation.picture
    elif request.HasField("generation"):
        generation = request.generation
        yield from (getattr(generation, name) for name in ("image", "mask") if generation.HasField(name))
        yield from (control.picture for control in generation.controls if control.HasField("picture"))


def _webhook_url(url: str) -> str:
    """What can be told from the address alone; where it leads is looked at when it is called."""
    fields.text(url, URL_LIMIT_BYTES, field="webhook_url")
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidField("must be an http or https URL", field="webhook_url")
    if parts.username is not None or parts.password is not None:
        raise InvalidField("must not hold a user or a password", field="webhook_url")
    return url


def _work(request: gateway_pb2.CreateJobRequest, catalog: Catalog) -> NewWork:
    match request.WhichOneof("work"):
        case "generation":
            return new_generation(request.generation, catalog)
        case "annotation":
            return _annotation(request.annotation, catalog)
    raise InvalidField("is missing: ask for a generation or an annotation", field="work")


def _annotation(message: gateway_pb2.Annotation, catalog: Catalog) -> NewAnnotation:
    require_stage(catalog, PREPROCESS)
    annotator = annotator_of(catalog, message.annotator, field="annotation.annotator")
    if (message.width_px == 0) != (message.height_px == 0):
        missing = "height_px" if message.width_px else "width_px"
        raise InvalidField("is missing: give both sides or none", field=f"annotation.{missing}")
    if message.width_px:
        fields.whole(message.width_px, MIN_SIDE_PX, MAX_SIDE_PX, field="annotation.width_px")
        fields.whole(message.height_px, MIN_SIDE_PX, MAX_SIDE_PX, field="annotation.height_px")
    return NewAnnotation(
        picture=picture(message.picture, field="annotation.picture"),
        annotator=annotator.id,
        parameters=parameters.given(message.parameters, annotator, field="annotation.parameters"),
        width_px=message.width_px,
        height_px=message.height_px,
    )


def new_jobs(request: gateway_pb2.CreateJobsRequest, catalog: Catalog) -> list[NewJob | FanlightError]:
    """Each for itself, or why it cannot be. InvalidField for none or too many."""
    if not 1 <= len(request.requests) <= BATCH_LIMIT:
        raise InvalidField(f"has {len(request.requests)} entries; must be 1 to {BATCH_LIMIT}", field="requests")
    return [_new_or_refused(each, catalog) for each in request.requests]


def _new_or_refused(request: gateway_pb2.CreateJobRequest, catalog: Catalog) -> NewJob | FanlightError:
    try:
        return new_job(request, catalog)
    except FanlightError as error:
        return error


def only(request: gateway_pb2.ListJobsRequest) -> Only:
    return Only(
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
        raise InvalidField(f"is {state}, which is no state of a job", field="state")
    return _STATES[state]
