"""Workers blame fields of their task; clients know those of their job."""

from dataclasses import replace

from services.gateway.jobs.model import Failure, Job, Task

# The field of a request that is all about one image, such as AnnotateRequest's.
IMAGE = "image"


def in_words_of_job(failure: Failure, job: Job, number: int) -> Failure:
    """The failure of that task, its field named as in the request that the client sent."""
    if not failure.field:
        return failure
    return replace(failure, field=_clients_field(failure.field, job, job.tasks[number - 1]))


def _clients_field(field: str, job: Job, task: Task) -> str:
    """A task that was not asked for itself is blamed on what takes its output, and its image on the place of that."""
    asked = job.asked.field
    taken_at = next((each.field for other in job.tasks for each in other.inputs if each.task == task.number), "")
    if task.stage == job.asked.stage or not taken_at:
        return f"{asked}.{field}"
    first, dot, rest = field.partition(".")
    if first == IMAGE:
        return f"{asked}.{taken_at}{dot}{rest}"
    parent, is_below, _ = taken_at.rpartition(".")
    return f"{asked}.{parent}.{field}" if is_below else f"{asked}.{field}"
