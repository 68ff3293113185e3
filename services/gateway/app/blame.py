"""Workers blame fields of their task; clients know those of their job."""

from dataclasses import replace

from services.gateway.jobs.model import Failure, Job, Task


def in_words_of_job(failure: Failure, job: Job, number: int) -> Failure:
    """The failure of that task, its field named as in the request that the client sent."""
    if not failure.field:
        return failure
    return replace(failure, field=f"{_prefix(job, job.tasks[number - 1])}.{failure.field}")


def _prefix(job: Job, task: Task) -> str:
    """A task that was not asked for itself is blamed on the field that takes what it makes."""
    asked = job.asked.field
    if task.stage == job.asked.stage:
        return asked
    takers = (each.field for other in job.tasks for each in other.inputs if each.task == task.number)
    field = next(takers, "")
    return f"{asked}.{field.rpartition('.')[0]}" if "." in field else asked
