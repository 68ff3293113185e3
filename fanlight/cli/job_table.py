"""Jobs as columns of text."""

from collections.abc import Sequence

from fanlight.cli.output import print_columns
from fanlight.gateway.v1.gateway_pb2 import Job, Task

PROMPT_SHOWN = 48


def print_jobs(jobs: Sequence[Job]) -> None:
    print_columns(("JOB", "STATE", "CREATED", "IMAGES", "WORK"), [_job_row(job) for job in jobs])


def print_job(job: Job) -> None:
    """The job, then why it failed, its tasks and its images, where there are any."""
    print_jobs([job])
    if job.HasField("failure"):
        where = f"{job.failure.field}: " if job.failure.field else ""
        print(f"\nfailed: {where}{job.failure.message}")
    if job.tasks:
        print()
        print_columns(("TASK", "STAGE", "STATE", "ATTEMPTS", "STEP", "WORKER"), [_task_row(task) for task in job.tasks])
    if job.images:
        print()
        rows = [(image.seed, f"{image.width_px}x{image.height_px}", image.blob.digest) for image in job.images]
        print_columns(("SEED", "SIZE", "DIGEST"), rows)


def _job_row(job: Job) -> tuple[object, ...]:
    created = job.create_time.ToJsonString()[:19] if job.HasField("create_time") else "-"
    return job.name, _word(Job.State.Name(job.state)), created, f"{len(job.images)}/{_wanted(job)}", _work(job)


def _wanted(job: Job) -> int:
    return job.generation.count or 1


def _work(job: Job) -> str:
    if job.HasField("annotation"):
        return f"annotate {job.annotation.annotator}"
    prompt = " ".join(job.generation.prompt.split())
    return prompt if len(prompt) <= PROMPT_SHOWN else f"{prompt[: PROMPT_SHOWN - 1]}…"


def _task_row(task: Task) -> tuple[object, ...]:
    step = f"{task.step}/{task.steps}" if task.steps else "-"
    return task.number, task.stage, _word(Task.State.Name(task.state)), task.attempts, step, task.worker or "-"


def _word(state: str) -> str:
    return state.removeprefix("STATE_").lower()
