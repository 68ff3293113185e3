"""Why jobs wait: domain to protobuf."""

from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.explain import JobExplanation, TaskExplanation
from services.gateway.jobs.model import JobEstimate
from services.gateway.scheduler.explain import PassedOver


def explanation(value: JobExplanation) -> gateway_pb2.JobExplanation:
    return gateway_pb2.JobExplanation(
        name=value.job.name,
        summary=value.summary,
        estimate=estimate(value.job.estimate),
        tasks=[_task(task) for task in value.tasks],
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


def _task(value: TaskExplanation) -> gateway_pb2.TaskExplanation:
    return gateway_pb2.TaskExplanation(
        task=value.task,
        stage=value.stage,
        why=value.why,
        needs=value.needs,
        worker=value.worker,
        tasks_ahead=value.tasks_ahead,
        workers=[_worker(each) for each in value.workers],
        workers_left_out=value.workers_left_out,
    )


def _worker(value: PassedOver) -> gateway_pb2.WorkerExplanation:
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
