"""A bar on standard error for a job that is waited for; nothing where that is no terminal."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

    from fanlight.common.v1.common_pb2 import FetchProgress
    from fanlight.gateway.v1.gateway_pb2 import Job, JobEvent


class JobBar:
    """Fed with a job's events. Its length is the job's tasks; a task's steps are parts of one."""

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = console or Console(stderr=True)
        columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
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
            self._bar.update(self._task, description=fetching(event.progress.fetch))

    def _on_job(self, job: "Job") -> None:
        from fanlight.gateway.v1.gateway_pb2 import Task

        ended = [task for task in job.tasks if task.end_time.seconds or task.state == Task.STATE_SUCCEEDED]
        self._parts |= {task.number: 1.0 for task in ended}
        at_work = sorted({task.stage for task in job.tasks if task.state == Task.STATE_LEASED})
        doing = f"{', '.join(at_work) or 'waiting'} {len(ended)}/{len(job.tasks)}"
        total = len(job.tasks) or None
        self._bar.update(self._task, description=doing, total=total, completed=sum(self._parts.values()))


def fetching(fetch: "FetchProgress") -> str:
    """Such as `fetching sd15: 120 of 2067 MB, 98 Mbit/s, 159 s left`."""
    mega = 1_000_000
    amount = f"{fetch.done_bytes // mega} of {fetch.total_bytes // mega} MB, {fetch.goodput_bps / mega:.0f} Mbit/s"
    left = f", {fetch.seconds_left:.0f} s left" if fetch.HasField("seconds_left") else ""
    return f"fetching {fetch.reference}: {amount}{left}"
