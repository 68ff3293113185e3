"""What passes between the queue and workers: polls and reports in, leased tasks out."""

import math
from collections.abc import Sequence

from fanlight.common.v1 import common_pb2
from fanlight.contract.digests import parse_digest, parse_scope
from fanlight.contract.fields import check_bytes, check_number, check_whole
from fanlight.errors import InvalidField
from fanlight.queue.v1 import queue_pb2
from services.gateway.app.hub import Fetching, Progress
from services.gateway.app.polls import LeasedTask, Poll, PollAnswer, WantedModel
from services.gateway.app.queue import Made, Renewal, Renewed
from services.gateway.jobs.machine import Standing
from services.gateway.jobs.model import Failure, Fault, Span, task_name
from services.gateway.wire.stages import request_for
from services.gateway.wire.workers import capabilities, polling_worker

BATCH_LIMIT = 64
WAIT_LIMIT_S = 60.0
HELD_LIMIT = 1_024
RENEWALS_LIMIT = 1_024
DIGEST_LIMIT_BYTES = 64
SPANS_LIMIT = 64
PREVIEW_LIMIT_BYTES = 64 * 1024
REASON_LIMIT = 64
MESSAGE_LIMIT = 2_000
PROVENANCE_LIMIT_BYTES = 16_384
REFERENCE_LIMIT_CHARS = 256

_STATUS = {
    Standing.LIVE: queue_pb2.RenewedLease.STATUS_RENEWED,
    Standing.CANCELLED: queue_pb2.RenewedLease.STATUS_CANCELLED,
    Standing.LOST: queue_pb2.RenewedLease.STATUS_LOST,
}

_FAULTS = {queue_pb2.FailTaskRequest.FAULT_REQUEST: Fault.REQUEST, queue_pb2.FailTaskRequest.FAULT_NODE: Fault.NODE}


def poll(request: queue_pb2.LeaseTasksRequest) -> Poll:
    if len(request.held_lease_tokens) > HELD_LIMIT:
        raise InvalidField(f"has more than {HELD_LIMIT} entries", field="held_lease_tokens")
    if len(request.capabilities_digest) > DIGEST_LIMIT_BYTES:
        raise InvalidField(f"has more than {DIGEST_LIMIT_BYTES} bytes", field="capabilities_digest")
    return Poll(
        worker=polling_worker(request.worker, draining=request.draining),
        capabilities_digest=request.capabilities_digest.hex(),
        capabilities=capabilities(request.capabilities) if request.HasField("capabilities") else None,
        max_tasks=check_whole(request.max_tasks, 0, BATCH_LIMIT, field="max_tasks"),
        held_tokens=frozenset(token(each) for each in request.held_lease_tokens),
        wait_s=check_number(request.wait_s, 0.0, WAIT_LIMIT_S, field="wait_s"),
    )


def poll_answer(answer: PollAnswer) -> queue_pb2.LeaseTasksResponse:
    return queue_pb2.LeaseTasksResponse(
        tasks=[_leased(each) for each in answer.tasks],
        wants_capabilities=answer.wants_capabilities,
        fetches=[_fetch(each) for each in answer.fetches or ()],
        has_fetches=answer.fetches is not None,
    )


def _fetch(fetch: WantedModel) -> queue_pb2.Fetch:
    return queue_pb2.Fetch(model=fetch.model, kind=fetch.kind, size_bytes=fetch.size_bytes)


def token(data: bytes) -> str:
    """What is no token of ours becomes a text that is none either."""
    return data[:256].decode("ascii", "replace")


def _leased(leased: LeasedTask) -> queue_pb2.LeasedTask:
    job, task = leased.job, leased.task
    return queue_pb2.LeasedTask(
        name=task_name(job.id, task.number),
        lease_token=leased.token.encode(),
        ttl_s=leased.ttl_s,
        attempt=task.leases,
        alone=task.alone,
        scope=job.tenant,
        request=request_for(job, task),
    )


def renewals(request: queue_pb2.RenewLeasesRequest) -> list[Renewal]:
    if len(request.renewals) > RENEWALS_LIMIT:
        raise InvalidField(f"has more than {RENEWALS_LIMIT} entries", field="renewals")
    return [Renewal(token=token(each.lease_token), progress=_progress(each)) for each in request.renewals]


def _progress(renewal: queue_pb2.Renewal) -> Progress | None:
    if not renewal.HasField("progress"):
        return None
    said = renewal.progress
    preview = said.preview if len(said.preview) <= PREVIEW_LIMIT_BYTES else b""
    fetching = _fetching(said.fetch) if said.HasField("fetch") else None
    return Progress(task=0, step=said.step, steps=said.steps, preview=preview, fetching=fetching)


def _fetching(said: common_pb2.FetchProgress) -> Fetching:
    """Best effort: what is too long is cut, what nobody can have measured is unknown."""
    left_s = said.seconds_left if said.HasField("seconds_left") and math.isfinite(said.seconds_left) else None
    return Fetching(
        reference=said.reference[:REFERENCE_LIMIT_CHARS],
        done_bytes=max(0, said.done_bytes),
        total_bytes=max(0, said.total_bytes),
        goodput_bps=said.goodput_bps if math.isfinite(said.goodput_bps) else 0.0,
        seconds_left=left_s,
        source=said.source[:REFERENCE_LIMIT_CHARS],
    )


def renewed(answers: list[Renewed], fetches: Sequence[WantedModel] | None) -> queue_pb2.RenewLeasesResponse:
    leases = [
        queue_pb2.RenewedLease(lease_token=each.token.encode(), status=_STATUS[each.standing], ttl_s=each.ttl_s)
        for each in answers
    ]
    return queue_pb2.RenewLeasesResponse(
        leases=leases, fetches=[_fetch(each) for each in fetches or ()], has_fetches=fetches is not None
    )


def made(request: queue_pb2.CompleteTaskRequest) -> list[Made]:
    if len(request.outputs) != 1:
        raise InvalidField(f"has {len(request.outputs)} entries; a task has one output", field="outputs")
    return [_made(each, f"outputs[{i}]") for i, each in enumerate(request.outputs)]


def _made(output: queue_pb2.Output, field: str) -> Made:
    return Made(
        scope=parse_scope(output.blob.scope, field=f"{field}.blob.scope"),
        digest=parse_digest(output.blob.digest, field=f"{field}.blob.digest"),
        width_px=output.width_px,
        height_px=output.height_px,
        seed=output.seed if output.HasField("seed") else None,
        nsfw=output.nsfw if output.HasField("nsfw") else None,
        provenance=check_bytes(output.provenance_json, PROVENANCE_LIMIT_BYTES, field=f"{field}.provenance_json"),
    )


def spans(request: queue_pb2.CompleteTaskRequest) -> list[Span]:
    """Those within the limit; they are for people to look at."""
    return [Span(name=span.name[:REASON_LIMIT], duration_s=span.duration_s) for span in request.spans[:SPANS_LIMIT]]


def fault(request: queue_pb2.FailTaskRequest) -> Fault | None:
    """None when the task is only given back."""
    if request.fault == queue_pb2.FailTaskRequest.FAULT_RETURNED:
        return None
    if request.fault not in _FAULTS:
        raise InvalidField("must say whose fault it is", field="fault")
    return _FAULTS[request.fault]


def failure(request: queue_pb2.FailTaskRequest) -> Failure:
    said = request.failure
    return Failure(
        reason=said.reason[:REASON_LIMIT] or "NODE_FAULT",
        message=said.message[:MESSAGE_LIMIT],
        field=said.field[:MESSAGE_LIMIT],
    )
