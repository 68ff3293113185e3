"""Workers blame fields of their task; clients know those of their job."""

from dataclasses import replace

from services.gateway.jobs.model import Annotation, Failure, Job


def in_words_of_job(failure: Failure, job: Job, number: int) -> Failure:
    """The failure of that task, its field named as in the request that the client sent."""
    if not failure.field:
        return failure
    return replace(failure, field=f"{_prefix(job, number)}.{failure.field.replace('].image', '].picture')}")


def _prefix(job: Job, number: int) -> str:
    if isinstance(job.work, Annotation):
        return "annotation"
    for i, image in enumerate(job.control_images):
        if image.task == number:
            return f"generation.controls[{i}]"
    return "generation"
