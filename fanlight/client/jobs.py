"""What a job's record says: whether it has ended, and why it failed."""

from fanlight.errors import JobFailed
from fanlight.gateway.v1.gateway_pb2 import Job

_ENDED = frozenset({Job.STATE_SUCCEEDED, Job.STATE_FAILED, Job.STATE_CANCELLED})


def has_ended(job: Job) -> bool:
    return job.state in _ENDED


def require_success(job: Job) -> None:
    """JobFailed unless the job has its pictures."""
    if job.state == Job.STATE_SUCCEEDED:
        return
    if job.state == Job.STATE_CANCELLED:
        raise JobFailed(f"{job.name} was cancelled", job=job.name, code="CANCELLED", reason="CANCELLED")
    failure = job.failure
    where = f"{failure.field}: " if failure.field else ""
    raise JobFailed(
        f"{job.name} failed: {where}{failure.message or 'no reason was given'}",
        job=job.name,
        code="FAILED_PRECONDITION" if failure.field else "INTERNAL",
        reason=failure.reason,
        field=failure.field,
    )
