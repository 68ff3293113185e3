"""Where a job's time went, told from its record."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from fanlight.gateway.v1.gateway_pb2 import Job, Task


def timings_of(job: "Job") -> dict[str, object]:
    """Seconds: `job_s` from its acceptance to its end, and for each stage where the task that ended last spent its
    time: `queue_s` until a worker took it, then the worker's own spans. Tasks run side by side, so sums would lie.
    """
    last = {task.stage: task for task in sorted(job.tasks, key=lambda task: _seconds(task.end_time))}
    stages = {stage: _of_task(task) for stage, task in last.items()}
    return {"job_s": _between(job.create_time, job.end_time), **stages}


def _of_task(task: "Task") -> dict[str, float]:
    spans = {f"{span.name}_s": round(span.duration_s, 3) for span in task.spans}
    return {"queue_s": _between(task.queue_time, task.lease_time), **spans}


def _between(begin: "Timestamp", end: "Timestamp") -> float:
    """0 where one of them is not set."""
    return round(max(0.0, _seconds(end) - _seconds(begin)), 3) if begin.seconds and end.seconds else 0.0


def _seconds(moment: "Timestamp") -> float:
    return moment.seconds + moment.nanos / 1e9
