"""Why a job waits, as text."""

from fanlight.cli.output import print_columns
from fanlight.gateway.v1.gateway_pb2 import JobEstimate, JobExplanation, TaskExplanation, WorkerExplanation


def print_explanation(found: JobExplanation) -> None:
    print(f"{found.name}: {found.summary}")
    if found.HasField("estimate"):
        print(_estimate(found.estimate, waits=bool(found.tasks)))
    for task in found.tasks:
        _print_task(task)


def _estimate(estimate: JobEstimate, *, waits: bool) -> str:
    soon = f"ready in about {estimate.ready_s:.0f} s"
    parts = [soon if estimate.ready_s >= 0.5 else "it should be ready by now"]
    if waits:
        parts.append(f"{estimate.tasks_ahead} tasks ahead")
    if estimate.fetch_bytes:
        link = f" over {estimate.link_bps / 1e6:.0f} Mbit/s" if estimate.link_bps else ""
        parts.append(f"{estimate.fetch_bytes / 1e6:.0f} MB to fetch on {estimate.node}{link}")
    return ", ".join(parts)


def _print_task(task: TaskExplanation) -> None:
    print(f"\ntask {task.task} ({task.stage}) waits: {task.why}")
    if task.needs:
        print(f"it needs {', '.join(task.needs)}")
    if task.workers:
        print_columns(("WORKER", "VERDICT", "READY", "WHY"), [_row(worker) for worker in task.workers])
    if task.workers_left_out:
        print(f"and {task.workers_left_out} more workers")


def _row(worker: WorkerExplanation) -> tuple[object, ...]:
    ready = f"{worker.finish_s:.1f} s" if worker.HasField("finish_s") else "-"
    return worker.worker, worker.verdict, ready, worker.why
