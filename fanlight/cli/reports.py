"""What commands show of a job: a progress bar, tables, why it waits, and where its time went."""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fanlight.cli.output import print_columns, print_line
from fanlight.client.watch import warnings_of
from fanlight.gateway.v1.gateway_pb2 import Job, JobEstimate, JobExplanation, Task, TaskExplanation, WorkerExplanation
from fanlight.terminal import printable

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from rich.console import Console

    from fanlight.common.v1.common_pb2 import Failure, FetchProgress
    from fanlight.gateway.v1.gateway_pb2 import JobEvent


class JobBar:
    """A progress bar on standard error, updated by a job's events; hidden where that is not a terminal.

    Its length is the number of tasks; the steps of a task are fractions of one.
    """

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("waiting", total=None)
        self._parts: dict[int, float] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_event(self, event: "JobEvent") -> None:
        if event.HasField("job"):
            self._on_job(event.job)
        elif event.progress.steps:
            self._parts[event.progress.task] = event.progress.step / event.progress.steps
            self._bar.update(self._task, completed=sum(self._parts.values()))
        elif event.progress.HasField("fetch"):
            self._bar.update(self._task, description=printable(fetching(event.progress.fetch)))

    def _on_job(self, job: "Job") -> None:
        ended = [task for task in job.tasks if task.end_time.seconds or task.state == Task.STATE_SUCCEEDED]
        self._parts |= {task.number: 1.0 for task in ended}
        at_work = sorted({task.stage for task in job.tasks if task.state == Task.STATE_LEASED})
        doing = f"{', '.join(at_work) or 'waiting'} {len(ended)}/{len(job.tasks)}"
        total = len(job.tasks) or None
        self._bar.update(self._task, description=printable(doing), total=total, completed=sum(self._parts.values()))


def fetching(fetch: "FetchProgress") -> str:
    """Such as `fetching sd15: 120 of 2067 MB, 98 Mbit/s, 159 s left`."""
    mega = 1_000_000
    amount = f"{fetch.done_bytes // mega} of {fetch.total_bytes // mega} MB, {fetch.goodput_bps / mega:.0f} Mbit/s"
    left = f", {fetch.seconds_left:.0f} s left" if fetch.HasField("seconds_left") else ""
    return f"fetching {fetch.reference}: {amount}{left}"


PROMPT_SHOWN = 48


def print_jobs(jobs: Sequence[Job]) -> None:
    print_columns(("JOB", "STATE", "CREATED", "IMAGES", "WORK"), [_job_row(job) for job in jobs])


def print_job(job: Job) -> None:
    """The job, then why it failed, its tasks and its images, where there are any."""
    print_jobs([job])
    if job.HasField("failure"):
        print()
        print_line(f"failed: {_failure(job.failure)}")
    for sentence in warnings_of(job):
        print_line(f"warning: {' '.join(sentence.split())}")
    if job.tasks:
        print()
        print_columns(("TASK", "STAGE", "STATE", "ATTEMPTS", "STEP", "WORKER"), [_task_row(task) for task in job.tasks])
        for task in job.tasks:
            if task.HasField("failure") and not job.HasField("failure"):
                print_line(f"task {task.number}, last attempt: {_failure(task.failure)}")
    if job.images:
        print()
        rows = [(image.seed, f"{image.width_px}x{image.height_px}", image.blob.digest) for image in job.images]
        print_columns(("SEED", "SIZE", "DIGEST"), rows)


def _failure(failure: "Failure") -> str:
    where = f"{failure.field}: " if failure.field else ""
    return f"{where}{failure.message}"


def _job_row(job: Job) -> tuple[object, ...]:
    created = job.create_time.ToJsonString()[:19] if job.HasField("create_time") else "-"
    return (
        job.name,
        _state_name(Job.State.Name(job.state)),
        created,
        f"{len(job.images)}/{_image_count(job)}",
        _work(job),
    )


def _image_count(job: Job) -> int:
    return job.generation.count or 1


def _work(job: Job) -> str:
    if job.HasField("annotation"):
        return f"annotate {job.annotation.annotator}"
    prompt = " ".join(job.generation.prompt.split())
    return prompt if len(prompt) <= PROMPT_SHOWN else f"{prompt[: PROMPT_SHOWN - 1]}…"


def _task_row(task: Task) -> tuple[object, ...]:
    step = f"{task.step}/{task.steps}" if task.steps else "-"
    return task.number, task.stage, _state_name(Task.State.Name(task.state)), task.attempts, step, task.worker or "-"


def _state_name(state: str) -> str:
    return state.removeprefix("STATE_").lower()


def print_explanation(found: JobExplanation) -> None:
    print_line(f"{found.name}: {found.summary}")
    if found.HasField("estimate"):
        print_line(_estimate(found.estimate, waits=bool(found.tasks)))
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
    print()
    print_line(f"task {task.task} ({task.stage}) waits: {task.why}")
    if task.needs:
        print_line(f"it needs {', '.join(task.needs)}")
    if task.workers:
        print_columns(("WORKER", "VERDICT", "READY", "WHY"), [_worker_row(worker) for worker in task.workers])
    if task.workers_left_out:
        print(f"and {task.workers_left_out} more workers")


def _worker_row(worker: WorkerExplanation) -> tuple[object, ...]:
    ready = f"{worker.finish_s:.1f} s" if worker.HasField("finish_s") else "-"
    return worker.worker, worker.verdict, ready, worker.why


def timings_of(job: "Job") -> dict[str, object]:
    """Seconds: `job_s` from acceptance to end, and for each stage the times of its task that ended last: `queue_s`
    until a worker leased it, then the worker's own spans. Tasks run in parallel, so there are no sums.
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
