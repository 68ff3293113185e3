"""What clients and their webhooks get: domain to protobuf."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from google.protobuf import timestamp_pb2
from google.protobuf.json_format import MessageToDict

from fanlight.common.v1 import common_pb2
from fanlight.contract.annotation import description
from fanlight.contract.defaults import NO_DEFAULTS
from fanlight.contract.filled import defaults_to_proto
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.dead_letters import DeadLetter
from services.gateway.app.deletion import DeletedJob
from services.gateway.app.explain import JobExplanation, TaskExplanation
from services.gateway.app.watch import FetchStatus, TaskProgress
from services.gateway.domain.delivery import Delivery, DeliveryAttempt, DeliveryState
from services.gateway.domain.job import Attempt, ControlImage, Failure, Job, JobEstimate, Task, TaskState
from services.gateway.domain.workers import ANNOTATOR, RAM, VRAM, AnnouncedAnnotator, AnnouncedModel, WorkerStatus
from services.gateway.scheduler.explain import PassedOver
from services.gateway.wire import stages
from services.gateway.wire.images import blob
from services.gateway.wire.needs import Fleet
from services.gateway.wire.workers import worker
from services.kernel.blobs import media_type_of

_WEBHOOK_STATES = {
    DeliveryState.PENDING: gateway_pb2.Webhook.STATE_PENDING,
    DeliveryState.DELIVERED: gateway_pb2.Webhook.STATE_DELIVERED,
    DeliveryState.GIVEN_UP: gateway_pb2.Webhook.STATE_GIVEN_UP,
}


def job(value: Job) -> gateway_pb2.Job:
    message = gateway_pb2.Job(
        name=value.name,
        state=gateway_pb2.Job.State.Value(f"STATE_{value.state.upper()}"),
        revision=value.revision,
        create_time=moment(value.create_time_s),
        end_time=moment(value.end_time_s),
        priority=value.priority,
        request_id=value.request_id,
        estimate=estimate(value.estimate),
        images=_images(value),
        control_images=_control_images(value),
        tasks=[_task(task) for task in value.tasks],
        failure=_failure(value.failure),
        tenant=value.tenant,
        deadline_time=moment(value.deadline_s),
        webhook_url=value.webhook_url,
        pool=value.pool,
        redrives=value.redrives,
        warnings=value.warnings,
        labels=value.labels,
    )
    stages.show(value.request, message)
    return message


def results(values: Iterable[Job | FanlightError]) -> gateway_pb2.CreateJobsResponse:
    return gateway_pb2.CreateJobsResponse(results=[_result(value) for value in values])


def _result(value: Job | FanlightError) -> gateway_pb2.CreateJobResult:
    if isinstance(value, Job):
        return gateway_pb2.CreateJobResult(job=job(value))
    failure = common_pb2.Failure(reason=value.reason, message=value.message, field=value.field)
    return gateway_pb2.CreateJobResult(failure=failure)


def dead_letter(value: DeadLetter) -> gateway_pb2.DeadLetter:
    return gateway_pb2.DeadLetter(
        task=value.task,
        stage=value.stage,
        tenant=value.tenant,
        end_time=moment(value.time_s),
        failure=_failure(value.failure),
        attempts=[_attempt(each) for each in value.attempts],
    )


def dead_letters(values: Sequence[DeadLetter], page_size: int) -> gateway_pb2.ListDeadLettersResponse:
    return gateway_pb2.ListDeadLettersResponse(
        letters=[dead_letter(each) for each in values],
        next_page_token=values[-1].task if len(values) == page_size else "",
    )


def _attempt(value: Attempt) -> gateway_pb2.Attempt:
    return gateway_pb2.Attempt(
        worker=value.worker,
        node=value.node,
        lease_time=moment(value.lease_time_s),
        end_time=moment(value.end_time_s),
        failure=_failure(value.failure),
        refused=value.refused,
    )


def event(value: Job | TaskProgress) -> gateway_pb2.JobEvent:
    if isinstance(value, Job):
        return gateway_pb2.JobEvent(job=job(value))
    progress = gateway_pb2.TaskProgress(
        task=value.task,
        step=value.step,
        steps=value.steps,
        preview=value.preview,
        preview_media_type=media_type_of(value.preview[:16]),
        fetch=_fetching(value.fetching) if value.fetching else None,
    )
    return gateway_pb2.JobEvent(progress=progress)


def _fetching(value: FetchStatus) -> common_pb2.FetchProgress:
    return common_pb2.FetchProgress(
        reference=value.reference,
        done_bytes=value.done_bytes,
        total_bytes=value.total_bytes,
        goodput_bps=value.goodput_bps,
        seconds_left=value.seconds_left,
        source=value.source,
    )


def moment(time_s: float) -> timestamp_pb2.Timestamp | None:
    """None for 0, a time that has not come yet."""
    if not time_s:
        return None
    time = timestamp_pb2.Timestamp()
    time.FromMicroseconds(int(time_s * 1e6))
    return time


def _images(value: Job) -> Iterator[gateway_pb2.Image]:
    """The finished ones of what was requested."""
    if not value.tasks:
        yield from (_cached_image(image) for image in value.control_images if image.blob)
    for task in value.tasks:
        if task.stage == value.request.stage and task.state is TaskState.SUCCEEDED:
            for output in task.outputs:
                yield gateway_pb2.Image(
                    blob=blob(output.blob),
                    seed=stages.seed_of(task) if output.seed is None else output.seed,
                    width_px=output.width_px,
                    height_px=output.height_px,
                    task=task.number,
                    nsfw=output.nsfw,
                    provenance_json=output.provenance,
                    warnings=output.warnings,
                    labels=output.labels,
                )


def _cached_image(image: ControlImage) -> gateway_pb2.Image:
    assert image.blob is not None
    return gateway_pb2.Image(blob=blob(image.blob), width_px=image.width_px, height_px=image.height_px)


def _control_images(value: Job) -> Iterator[gateway_pb2.ControlImage]:
    """Those that exist, except where the control image itself was requested."""
    for image in value.control_images:
        task = value.task(image.task)
        if not value.tasks or (task is not None and task.stage == value.request.stage):
            continue
        made = value.output_of(image.task)
        found = made.blob if made else image.blob
        if found is not None:
            yield gateway_pb2.ControlImage(blob=blob(found), annotator=image.annotator, cached=image.cached)


def _task(task: Task) -> gateway_pb2.Task:
    last = task.lease or (task.attempts[-1] if task.attempts else None)
    return gateway_pb2.Task(
        number=task.number,
        stage=task.stage,
        state=gateway_pb2.Task.State.Value(f"STATE_{task.state.upper()}"),
        worker=last.worker if last else "",
        node=last.node if last else "",
        attempts=task.leases,
        step=task.step,
        steps=task.steps,
        failure=_failure(task.failure),
        spans=[common_pb2.Span(name=span.name, duration_s=span.duration_s) for span in task.spans],
        queue_time=moment(task.queue_time_s),
        lease_time=moment(task.lease.time_s if task.lease else 0.0),
        end_time=moment(task.end_time_s),
        not_before_time=moment(task.not_before_s),
        failed_attempts=[_attempt(each) for each in task.attempts],
        inputs=[gateway_pb2.TaskInput(field=each.field, task=each.task) for each in task.inputs if each.task],
    )


def _failure(value: Failure | None) -> common_pb2.Failure | None:
    if value is None:
        return None
    return common_pb2.Failure(reason=value.reason, message=value.message, field=value.field, part=value.part)


def annotators(fleet: Fleet) -> gateway_pb2.ListAnnotatorsResponse:
    known = sorted(fleet.catalog().annotators.values(), key=lambda each: each.id)
    return gateway_pb2.ListAnnotatorsResponse(
        annotators=[annotator(each, fleet.residency_of(ANNOTATOR, each.id)) for each in known]
    )


def models(fleet: Fleet, *, left_out: bool = False) -> gateway_pb2.ListModelsResponse:
    """`left_out`: also what workers found and do not use."""
    known = sorted(fleet.catalog().models.values(), key=lambda each: (each.kind, each.id, each.family))
    default = fleet.catalog().default_checkpoint()
    known = [replace(each, is_default=each == default) for each in known]
    response = gateway_pb2.ListModelsResponse(
        models=[model(each, fleet.residency_of(each.kind, each.id)) for each in known]
    )
    if left_out:
        found = fleet.left_out()
        response.left_out.extend(
            diffusion_pb2.LeftOutModel(path=each.path, reason=each.reason, nodes=nodes) for each, nodes in found.listed
        )
        response.left_out_count = min(found.count, 2**32 - 1)
    return response


def annotator(value: AnnouncedAnnotator, residency: int = 0) -> preprocessor_pb2.Annotator:
    """`residency`: the best place where a worker holds it; 0 for unknown, as among capabilities."""
    return preprocessor_pb2.Annotator(
        id=value.id,
        description=value.description,
        parameters=[description(each) for each in value.parameters],
        deterministic=value.deterministic,
        weight_bytes=value.weight_bytes,
        loaded=not value.weight_bytes or residency in (RAM, VRAM),
        controlnets=value.controlnets,
        version=value.version,
        device=value.device,
        license=value.license,
        aliases=value.aliases,
    )


def model(value: AnnouncedModel, residency: int = 0) -> diffusion_pb2.Model:
    """`residency`: as for `annotator`."""
    return diffusion_pb2.Model(
        id=value.id,
        kind=value.kind,
        is_default=value.is_default,
        residency=diffusion_pb2.Model.Residency.ValueType(residency),
        size_bytes=value.size_bytes,
        license=value.license,
        pipelines=value.pipelines,
        width_px=value.width_px,
        height_px=value.height_px,
        size_step_px=value.size_step_px,
        family=value.family,
        schedulers=value.schedulers,
        aliases=value.aliases,
        text_encoder_layers=value.text_encoder_layers,
        note=value.note,
        defaults=None if value.defaults == NO_DEFAULTS else defaults_to_proto(value.defaults),
    )


def worker_status(value: WorkerStatus) -> gateway_pb2.WorkerStatus:
    return gateway_pb2.WorkerStatus(
        worker=worker(value.worker),
        last_poll_time=moment(value.last_poll_time_s),
        live=value.live,
        draining=value.worker.draining or bool(value.draining_reason),
        tasks=value.tasks,
        draining_reason=value.draining_reason,
        avoided=[
            gateway_pb2.AvoidedTasks(
                need=each.need, why=each.why, until_time=moment(each.until_s) if each.until_s else None
            )
            for each in value.avoided
        ],
    )


def explanation(value: JobExplanation) -> gateway_pb2.JobExplanation:
    return gateway_pb2.JobExplanation(
        name=value.job.name,
        summary=value.summary,
        estimate=estimate(value.job.estimate),
        tasks=[_task_explanation(task) for task in value.tasks],
    )


def estimate(value: JobEstimate | None) -> gateway_pb2.JobEstimate | None:
    if value is None:
        return None
    return gateway_pb2.JobEstimate(
        tasks_ahead=value.tasks_ahead,
        ready_s=round(value.ready_s, 2),
        fetch_bytes=value.fetch_bytes,
        fetch_s=round(value.fetch_s, 2),
        node=value.node,
        link_bps=value.link_bps,
    )


def _task_explanation(value: TaskExplanation) -> gateway_pb2.TaskExplanation:
    return gateway_pb2.TaskExplanation(
        task=value.task,
        stage=value.stage,
        why=value.why,
        needs=value.needs,
        worker=value.worker,
        tasks_ahead=value.tasks_ahead,
        workers=[_worker_explanation(each) for each in value.workers],
        workers_left_out=value.workers_left_out,
    )


def _worker_explanation(value: PassedOver) -> gateway_pb2.WorkerExplanation:
    needed = value.estimate
    if needed is None:
        return gateway_pb2.WorkerExplanation(
            worker=value.worker, node=value.node, verdict=value.verdict, why=value.why, missing=value.missing
        )
    return gateway_pb2.WorkerExplanation(
        worker=value.worker,
        node=value.node,
        verdict=value.verdict,
        why=value.why,
        finish_s=round(needed.finish_s, 2),
        slot_s=round(needed.slot_s, 2),
        fetch_s=round(needed.fetch_s, 2),
        fetch_bytes=needed.fetch_bytes,
        load_s=round(needed.load_s + needed.patch_s, 2),
        run_s=round(needed.run_s, 2),
        missing=value.missing,
    )


def payload(value: Job) -> bytes:
    """A webhook's body in the layout of Standard Webhooks; `data` is the job as the HTTP API shows it."""
    body = {
        "type": f"job.{value.state.value}",
        "timestamp": datetime.fromtimestamp(value.end_time_s, UTC).isoformat(),
        "data": MessageToDict(job(value), preserving_proto_field_name=True),
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def webhook(delivery: Delivery) -> gateway_pb2.Webhook:
    return gateway_pb2.Webhook(
        id=delivery.id,
        job=f"jobs/{delivery.job_id}",
        url=delivery.url,
        state=_WEBHOOK_STATES[delivery.state],
        next_time=moment(delivery.next_s),
        tries=[_try(each) for each in delivery.tries],
    )


def _try(value: DeliveryAttempt) -> gateway_pb2.WebhookTry:
    return gateway_pb2.WebhookTry(
        try_time=moment(value.time_s), status=value.status, error=value.error, duration_s=value.duration_s
    )


def deleted_job(deleted: DeletedJob) -> gateway_pb2.DeleteJobResponse:
    return gateway_pb2.DeleteJobResponse(name=deleted.name, blobs=deleted.blobs, shared_blobs=deleted.shared_blobs)
