"""What workers and the queue send each other: descriptions, polls and reports in, leased tasks out."""

import hashlib
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor

from fanlight.common.v1 import common_pb2
from fanlight.contract.annotation import described_all
from fanlight.contract.filled import read_defaults
from fanlight.contract.limits import (
    INLINE_BLOB_LIMIT_BYTES,
    PROVENANCE_LIMIT_BYTES,
    check_bytes,
    check_number,
    check_some_bytes,
    check_whole,
    size_step_px,
)
from fanlight.contract.names import parse_digest, parse_scope
from fanlight.contract.needs import young_fields
from fanlight.contract.warnings import bounded_warnings
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from fanlight.terminal import printable
from services.gateway.app.completion import Renewal, RenewalResult, ReportedOutput
from services.gateway.app.leasing import LeasedTask, ModelToFetch, Poll, PollAnswer
from services.gateway.app.results import is_preview
from services.gateway.app.watch import FetchStatus, TaskProgress
from services.gateway.domain.job import Failure, Fault, Span, task_name
from services.gateway.domain.machine import LeaseStatus
from services.gateway.domain.workers import (
    AnnouncedAnnotator,
    AnnouncedLeftOut,
    AnnouncedModel,
    Capabilities,
    ReportedStepTime,
    Worker,
)
from services.gateway.wire.stages import request_for

BATCH_LIMIT = 64
WAIT_LIMIT_S = 60.0
HELD_LIMIT = 1_024
RENEWALS_LIMIT = 1_024
DIGEST_LIMIT_BYTES = 64
SECRET_LIMIT_BYTES = 64
SPANS_LIMIT = 64
REASON_LIMIT = 64
MESSAGE_LIMIT = 2_000
REFERENCE_LIMIT_CHARS = 256

NAME_LIMIT_BYTES = 256
# Annotators, models and other offers together.
OFFERS_LIMIT = 10_000
LIMITS_LIMIT = 256
# Of what a worker found and does not use, and how much of a path, a reason or a note is kept.
LEFT_OUT_LIMIT = 500
WORDS_LIMIT_CHARS = 300
# Models in one place, or unfetched.
HOLDINGS_LIMIT = 20_000
SLOTS_LIMIT = 1_024
# Aliases of a model, its schedulers and the like.
NAMES_LIMIT = 256
DESCRIPTION_LIMIT_BYTES = 4_096
# Of a model's weights, a disk or a download: more than any has.
BYTES_LIMIT = 2**50
STEP_TIMES_LIMIT = 64
# Measurements beyond these are impossible, and so unknown: no link, step, span or download takes more.
GOODPUT_LIMIT_BPS = 1e15
DURATION_LIMIT_S = 1e8
PROGRESS_STEPS_LIMIT = 1_000_000
# Of a result; the gateway compares it with the image itself.
OUTPUT_SIDE_LIMIT_PX = 65_536
# Of an image's size; no image is larger.
SIZE_CLASS_LIMIT = 40
TEXT_ENCODER_LAYERS_LIMIT = 1_000
# Of a checkpoint's native size, and of what its sides must be multiples of.
MODEL_SIDE_MIN_PX, MODEL_SIDE_MAX_PX = 64, 8_192
MODEL_SIZE_STEP_LIMIT_PX = 512
REVISION_LIMIT = 10_000
KNOWN_MESSAGES_LIMIT = 256
# A worker's fields that are newer than the gateway's, of one message.
NEW_FIELDS_LIMIT = 64
# What protobuf allows.
FIELD_NUMBER_LIMIT = 2**29 - 1

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STAGE = re.compile(r"[a-z0-9_-]{1,32}")
# A stage's request may be a message of any package.
_MESSAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*){1,8}")
_STATUS = {
    LeaseStatus.LIVE: queue_pb2.RenewedLease.STATUS_RENEWED,
    LeaseStatus.CANCELLED: queue_pb2.RenewedLease.STATUS_CANCELLED,
    LeaseStatus.LOST: queue_pb2.RenewedLease.STATUS_LOST,
}

_FAULTS = {queue_pb2.FailTaskRequest.FAULT_REQUEST: Fault.REQUEST, queue_pb2.FailTaskRequest.FAULT_NODE: Fault.NODE}


def poll(request: queue_pb2.LeaseTasksRequest) -> Poll:
    if len(request.held_lease_tokens) > HELD_LIMIT:
        raise InvalidField(f"has more than {HELD_LIMIT} entries", field="held_lease_tokens")
    if len(request.capabilities_digest) > DIGEST_LIMIT_BYTES:
        raise InvalidField(f"has more than {DIGEST_LIMIT_BYTES} bytes", field="capabilities_digest")
    if len(request.holdings_digest) > DIGEST_LIMIT_BYTES:
        raise InvalidField(f"has more than {DIGEST_LIMIT_BYTES} bytes", field="holdings_digest")
    return Poll(
        worker=polling_worker(request.worker, draining=request.draining),
        capabilities_digest=request.capabilities_digest.hex(),
        capabilities=capabilities(request.capabilities) if request.HasField("capabilities") else None,
        max_tasks=check_whole(request.max_tasks, 0, BATCH_LIMIT, field="max_tasks"),
        held_tokens=frozenset(token(each) for each in request.held_lease_tokens),
        wait_s=check_number(request.wait_s, 0.0, WAIT_LIMIT_S, field="wait_s"),
        holdings_digest=request.holdings_digest.hex(),
        holdings_unchanged=request.holdings_unchanged,
        secret_hash=_hash_of(request.worker_secret),
    )


def _hash_of(secret: bytes) -> str:
    if len(secret) > SECRET_LIMIT_BYTES:
        raise InvalidField(f"has {len(secret)} bytes; at most {SECRET_LIMIT_BYTES}", field="worker_secret")
    return hashlib.sha256(secret).hexdigest() if secret else ""


def poll_answer(answer: PollAnswer, *, output_bytes_max: int = 0) -> queue_pb2.LeaseTasksResponse:
    """`output_bytes_max`: how large an output may be that comes along with a completion."""
    return queue_pb2.LeaseTasksResponse(
        tasks=[_leased(each) for each in answer.tasks],
        wants_capabilities=answer.wants_capabilities,
        fetches=[_fetch(each) for each in answer.fetches or ()],
        has_fetches=answer.fetches is not None,
        holdings_digest=bytes.fromhex(answer.holdings_digest),
        inline_output_bytes_max=output_bytes_max,
    )


def _fetch(fetch: ModelToFetch) -> queue_pb2.Fetch:
    return queue_pb2.Fetch(model=fetch.model, kind=fetch.kind, size_bytes=fetch.size_bytes)


def token(data: bytes) -> str:
    """Bytes that are not a token of ours become a string that is not one either."""
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
        inline_inputs=[
            queue_pb2.InlineBlob(scope=each.scope, digest=each.digest, data=each.data) for each in leased.inline_inputs
        ],
    )


def renewals(request: queue_pb2.RenewLeasesRequest) -> list[Renewal]:
    if len(request.renewals) > RENEWALS_LIMIT:
        raise InvalidField(f"has more than {RENEWALS_LIMIT} entries", field="renewals")
    return [Renewal(token=token(each.lease_token), progress=_progress(each)) for each in request.renewals]


def _progress(renewal: queue_pb2.Renewal) -> TaskProgress | None:
    if not renewal.HasField("progress"):
        return None
    progress = renewal.progress
    preview = progress.preview if is_preview(progress.preview) else b""
    fetching = _fetching(progress.fetch) if progress.HasField("fetch") else None
    step, steps = (min(each, PROGRESS_STEPS_LIMIT) for each in (progress.step, progress.steps))
    return TaskProgress(task=0, step=step, steps=steps, preview=preview, fetching=fetching)


def _fetching(message: common_pb2.FetchProgress) -> FetchStatus:
    """Best effort: what is too long is cut, an impossible measurement is unknown."""
    left_s = message.seconds_left if message.HasField("seconds_left") else None
    return FetchStatus(
        reference=message.reference[:REFERENCE_LIMIT_CHARS],
        done_bytes=_counted(message.done_bytes),
        total_bytes=_counted(message.total_bytes),
        goodput_bps=_measured(message.goodput_bps, GOODPUT_LIMIT_BPS),
        seconds_left=left_s if left_s is not None and 0 <= left_s <= DURATION_LIMIT_S else None,
        source=message.source[:REFERENCE_LIMIT_CHARS],
    )


def renewed(answers: list[RenewalResult], fetches: Sequence[ModelToFetch] | None) -> queue_pb2.RenewLeasesResponse:
    leases = [
        queue_pb2.RenewedLease(lease_token=each.token.encode(), status=_STATUS[each.status], ttl_s=each.ttl_s)
        for each in answers
    ]
    return queue_pb2.RenewLeasesResponse(
        leases=leases, fetches=[_fetch(each) for each in fetches or ()], has_fetches=fetches is not None
    )


def made(request: queue_pb2.CompleteTaskRequest) -> list[ReportedOutput]:
    if len(request.outputs) != 1:
        raise InvalidField(f"has {len(request.outputs)} entries; a task has one output", field="outputs")
    return [_made(each, f"outputs[{i}]") for i, each in enumerate(request.outputs)]


def _made(output: queue_pb2.Output, field: str) -> ReportedOutput:
    if len(output.data) > INLINE_BLOB_LIMIT_BYTES:
        raise TooLarge(
            f"has {len(output.data)} bytes; more than {INLINE_BLOB_LIMIT_BYTES} are written as a blob before",
            field=f"{field}.data",
        )
    return ReportedOutput(
        scope=parse_scope(output.blob.scope, field=f"{field}.blob.scope"),
        digest=parse_digest(output.blob.digest, field=f"{field}.blob.digest"),
        # What is impossible differs from the image, for which the result is refused and its attempt ends.
        width_px=min(output.width_px, OUTPUT_SIDE_LIMIT_PX),
        height_px=min(output.height_px, OUTPUT_SIDE_LIMIT_PX),
        seed=output.seed if output.HasField("seed") else None,
        nsfw=output.nsfw if output.HasField("nsfw") else None,
        provenance=check_bytes(output.provenance_json, PROVENANCE_LIMIT_BYTES, field=f"{field}.provenance_json"),
        warnings=bounded_warnings(output.warnings),
        data=output.data,
    )


def spans(request: queue_pb2.CompleteTaskRequest) -> list[Span]:
    """The first ones, up to the limit; they are for people to look at.

    Without those whose duration is impossible, such as NaN, which no record can keep.
    """
    return [
        Span(name=span.name[:REASON_LIMIT], duration_s=span.duration_s)
        for span in request.spans[:SPANS_LIMIT]
        if 0 <= span.duration_s <= DURATION_LIMIT_S
    ]


def fault(request: queue_pb2.FailTaskRequest) -> Fault | None:
    """None if the task is only returned."""
    if request.fault == queue_pb2.FailTaskRequest.FAULT_RETURNED:
        return None
    if request.fault not in _FAULTS:
        raise InvalidField("must say whose fault it is", field="fault")
    return _FAULTS[request.fault]


def failure(request: queue_pb2.FailTaskRequest) -> Failure:
    reported = request.failure
    return Failure(
        reason=reported.reason[:REASON_LIMIT] or "NODE_FAULT",
        message=reported.message[:MESSAGE_LIMIT],
        field=reported.field[:MESSAGE_LIMIT],
        part=reported.part[:MESSAGE_LIMIT],
    )


def polling_worker(message: queue_pb2.Worker, *, draining: bool) -> Worker:
    worker_id(message.id, field="worker.id")
    if not _STAGE.fullmatch(message.stage):
        raise InvalidField("must be 1 to 32 of a-z, 0-9, _ and -, such as preprocess", field="worker.stage")
    return Worker(
        id=message.id,
        node=_printable(check_some_bytes(message.node, NAME_LIMIT_BYTES, field="worker.node"), "worker.node"),
        stage=message.stage,
        version=_printable(check_bytes(message.version, NAME_LIMIT_BYTES, field="worker.version"), "worker.version"),
        device=_printable(check_bytes(message.device, NAME_LIMIT_BYTES, field="worker.device"), "worker.device"),
        slots=check_whole(message.slots, 0, SLOTS_LIMIT, field="worker.slots"),
        vram_models=_models(message.vram_models, "worker.vram_models"),
        ram_models=_models(message.ram_models, "worker.ram_models"),
        disk_models=_models(message.disk_models, "worker.disk_models"),
        goodput_bps=_measured(message.goodput_bps, GOODPUT_LIMIT_BPS),
        step_times=_step_times(message.step_times),
        draining=draining,
        vram_bytes=_counted(message.vram_bytes),
        goodput_deviation_bps=_measured(message.goodput_deviation_bps, GOODPUT_LIMIT_BPS),
        takes_fetches=message.takes_fetches,
        disk_bytes=_counted(message.disk_bytes),
        unfetched_models=_models(message.unfetched_models, "worker.unfetched_models"),
    )


def worker_id(text: str, *, field: str) -> str:
    if not _ID.fullmatch(text):
        raise InvalidField("must be 1 to 128 of letters, digits, . _ : and -", field=field)
    return text


def _models(names: Sequence[str], field: str) -> frozenset[str]:
    # Before anything is built of them: a million names are half a gigabyte.
    if len(names) > HOLDINGS_LIMIT:
        raise InvalidField(f"has {len(names)} models; at most {HOLDINGS_LIMIT} are taken", field=field)
    found = frozenset(names)
    for name in found:
        check_bytes(name, NAME_LIMIT_BYTES, field=field)
    return found


def _step_times(reported: Iterable[queue_pb2.StepTime]) -> tuple[ReportedStepTime, ...]:
    """The possible ones, up to a limit; of two for the same family and size the first one."""
    found: dict[tuple[str, int], ReportedStepTime] = {}
    for each in reported:
        mean_s = _measured(each.mean_s, DURATION_LIMIT_S)
        is_sound = mean_s and 0 < each.size_class <= SIZE_CLASS_LIMIT and len(each.family.encode()) <= NAME_LIMIT_BYTES
        if is_sound and len(found) < STEP_TIMES_LIMIT:
            time = ReportedStepTime(
                family=each.family,
                size_class=each.size_class,
                mean_s=mean_s,
                deviation_s=_measured(each.deviation_s, DURATION_LIMIT_S),
            )
            found.setdefault((each.family, each.size_class), time)
    return tuple(found.values())


def _measured(value: float, limit: float) -> float:
    """0, which means unknown, for an impossible measurement; NaN is one."""
    return value if 0 < value <= limit else 0.0


def _counted(size_bytes: int) -> int:
    """0, which means unknown, for an impossible count of bytes."""
    return size_bytes if 0 < size_bytes <= BYTES_LIMIT else 0


def worker(value: Worker) -> queue_pb2.Worker:
    return queue_pb2.Worker(
        id=value.id,
        node=value.node,
        stage=value.stage,
        version=value.version,
        device=value.device,
        slots=value.slots,
        vram_models=sorted(value.vram_models),
        ram_models=sorted(value.ram_models),
        disk_models=sorted(value.disk_models),
        goodput_bps=value.goodput_bps,
        vram_bytes=value.vram_bytes,
        goodput_deviation_bps=value.goodput_deviation_bps,
        takes_fetches=value.takes_fetches,
        disk_bytes=value.disk_bytes,
        unfetched_models=sorted(value.unfetched_models),
        step_times=[
            queue_pb2.StepTime(
                family=each.family, size_class=each.size_class, mean_s=each.mean_s, deviation_s=each.deviation_s
            )
            for each in value.step_times
        ],
    )


def capabilities(message: queue_pb2.Capabilities) -> Capabilities:
    if len(message.annotators) + len(message.models) + len(message.offers) > OFFERS_LIMIT:
        raise InvalidField(f"has more than {OFFERS_LIMIT} annotators, models and offers", field="capabilities")
    annotators = tuple(_annotator(each, f"capabilities.annotators[{i}]") for i, each in enumerate(message.annotators))
    models = tuple(_model(each, f"capabilities.models[{i}]") for i, each in enumerate(message.models))
    _require_unique((each.id for each in annotators), "capabilities.annotators[{}].id")
    _require_unique(((each.kind, each.id, each.family) for each in models), "capabilities.models[{}].id")
    offers = [
        check_some_bytes(each, NAME_LIMIT_BYTES, field=f"capabilities.offers[{i}]")
        for i, each in enumerate(message.offers)
    ]
    _require_unique(offers, "capabilities.offers[{}]")
    return Capabilities(
        annotators=annotators,
        models=models,
        other_offers=tuple(sorted({*offers, *_new_fields(message.contract)})),
        limits=_limits(message.limits),
        left_out=tuple(
            AnnouncedLeftOut(path=_words(each.path), reason=_words(each.reason))
            for each in message.left_out[:LEFT_OUT_LIMIT]
        ),
        left_out_count=max(message.left_out_count, min(len(message.left_out), LEFT_OUT_LIMIT)),
    )


def _words(text: str) -> str:
    """A worker's own words for people: cut, and escaped where they would control a terminal."""
    return printable(text[:WORDS_LIMIT_CHARS])[:WORDS_LIMIT_CHARS]


def _require_unique(values: Iterable[Hashable], field: str) -> None:
    """`field` has {} in the place of the number."""
    first: dict[Hashable, int] = {}
    for i, value in enumerate(values):
        if first.setdefault(value, i) != i:
            raise InvalidField(f"is the same as {field.format(first[value])}", field=field.format(i))


def _limits(limits: Sequence[queue_pb2.Limit]) -> tuple[tuple[str, int], ...]:
    if len(limits) > LIMITS_LIMIT:
        raise InvalidField(f"has {len(limits)} entries; at most {LIMITS_LIMIT} are taken", field="capabilities.limits")
    found = [
        (check_some_bytes(each.name, NAME_LIMIT_BYTES, field=f"capabilities.limits[{i}].name"), each.maximum)
        for i, each in enumerate(limits)
    ]
    _require_unique((name for name, _ in found), "capabilities.limits[{}].name")
    return tuple(sorted(found))


def _new_fields(contract: queue_pb2.ContractRevision) -> Iterator[str]:
    """What the worker knows of messages beyond the oldest ones, as needs such as `field:fanlight.common.v1.Blob:9`."""
    where = "capabilities.contract"
    check_whole(contract.revision, 0, REVISION_LIMIT, field=f"{where}.revision")
    if len(contract.messages) > KNOWN_MESSAGES_LIMIT:
        raise InvalidField(
            f"has {len(contract.messages)} entries; at most {KNOWN_MESSAGES_LIMIT} are taken", field=f"{where}.messages"
        )
    _require_unique((each.name for each in contract.messages), f"{where}.messages[{{}}].name")
    for i, each in enumerate(contract.messages):
        name, field = each.name, f"{where}.messages[{i}]"
        if not _MESSAGE.fullmatch(check_bytes(name, NAME_LIMIT_BYTES, field=f"{field}.name")):
            raise InvalidField(
                "must be a message's full name, such as fanlight.common.v1.ImageSource", field=f"{field}.name"
            )
        last = check_whole(each.last_field, 0, FIELD_NUMBER_LIMIT, field=f"{field}.last_field")
        yield from (need for need in young_fields(name) if int(need.rpartition(":")[2]) <= last)
        # In a message that this gateway does not know it never finds a new field.
        if (known := _last_field(name)) is not None:
            yield from (
                f"field:{name}:{number}" for number in range(known + 1, min(last, known + NEW_FIELDS_LIMIT) + 1)
            )


def _last_field(message: str) -> int | None:
    """The gateway's own; None for a message that it does not know."""
    try:
        found: Descriptor = descriptor_pool.Default().FindMessageTypeByName(message)
    except KeyError:
        return None
    return max((field.number for field in found.fields), default=0)


def _names(names: Sequence[str], field: str) -> tuple[str, ...]:
    if len(names) > NAMES_LIMIT:
        raise InvalidField(f"has {len(names)} entries; at most {NAMES_LIMIT} are taken", field=field)
    return tuple(check_bytes(name, NAME_LIMIT_BYTES, field=f"{field}[{i}]") for i, name in enumerate(names))


def _id(text: str, field: str) -> str:
    """An id that no reference and no LoRA tag can be mistaken for."""
    found = next((each for each in ":/<>" if each in text), "")
    if found:
        raise InvalidField(f"contains {found}, which is for references and LoRA tags; leave it out", field=field)
    return check_some_bytes(text, NAME_LIMIT_BYTES, field=field)


def _check_model_size(message: diffusion_pb2.Model, field: str) -> None:
    """All may be 0, for unknown."""
    step_px = check_whole(message.size_step_px, 0, MODEL_SIZE_STEP_LIMIT_PX, field=f"{field}.size_step_px")
    for name, side_px, other_px in (
        ("width_px", message.width_px, message.height_px),
        ("height_px", message.height_px, message.width_px),
    ):
        where = f"{field}.{name}"
        if not side_px and not other_px:
            continue
        if not side_px:
            raise InvalidField("is missing: give both sides or none", field=where)
        check_whole(side_px, MODEL_SIDE_MIN_PX, MODEL_SIDE_MAX_PX, field=where)
        if step_px and side_px % step_px:
            raise InvalidField(f"is {side_px}; must be a multiple of size_step_px, {step_px}", field=where)


def _printable(text: str, field: str) -> str:
    if not text.isprintable():
        raise InvalidField("must have only printable characters", field=field)
    return text


def _annotator(message: preprocessor_pb2.Annotator, field: str) -> AnnouncedAnnotator:
    return AnnouncedAnnotator(
        id=_id(message.id, f"{field}.id"),
        description=check_bytes(message.description, DESCRIPTION_LIMIT_BYTES, field=f"{field}.description"),
        parameters=described_all(message.parameters, field=f"{field}.parameters"),
        deterministic=message.deterministic,
        weight_bytes=check_whole(message.weight_bytes, 0, BYTES_LIMIT, field=f"{field}.weight_bytes"),
        controlnets=_names(message.controlnets, f"{field}.controlnets"),
        version=check_bytes(message.version, NAME_LIMIT_BYTES, field=f"{field}.version"),
        device=check_bytes(message.device, NAME_LIMIT_BYTES, field=f"{field}.device"),
        license=check_bytes(message.license, DESCRIPTION_LIMIT_BYTES, field=f"{field}.license"),
        aliases=_names(message.aliases, f"{field}.aliases"),
    )


def _model(message: diffusion_pb2.Model, field: str) -> AnnouncedModel:
    _check_model_size(message, field)
    return AnnouncedModel(
        id=_id(message.id, f"{field}.id"),
        kind=check_some_bytes(message.kind, NAME_LIMIT_BYTES, field=f"{field}.kind"),
        is_default=message.is_default,
        size_bytes=check_whole(message.size_bytes, 0, BYTES_LIMIT, field=f"{field}.size_bytes"),
        license=check_bytes(message.license, DESCRIPTION_LIMIT_BYTES, field=f"{field}.license"),
        pipelines=_names(message.pipelines, f"{field}.pipelines"),
        width_px=message.width_px,
        height_px=message.height_px,
        size_step_px=message.size_step_px,
        family=check_bytes(message.family, NAME_LIMIT_BYTES, field=f"{field}.family"),
        schedulers=_names(message.schedulers, f"{field}.schedulers"),
        aliases=_names(message.aliases, f"{field}.aliases"),
        text_encoder_layers=check_whole(
            message.text_encoder_layers, 0, TEXT_ENCODER_LAYERS_LIMIT, field=f"{field}.text_encoder_layers"
        ),
        note=_words(message.note),
        defaults=read_defaults(
            message.defaults, size_step_px=size_step_px(message.size_step_px), field=f"{field}.defaults"
        ),
    )
