"""How much waits, for those who scale workers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.gateway.app.kinds import kind_of
from services.gateway.jobs.model import Job, Task, TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLine:
    """How much waits for one stage and checkpoint; the checkpoint is empty for stages without."""

    stage: str
    checkpoint: str
    waiting: int
    blocked: int
    leased: int
    # Of the waiting ones; 0 where none waits.
    oldest_age_s: float


def queue_lines(jobs: Iterable[Job], *, now_s: float) -> Sequence[QueueLine]:
    """A line for each stage and checkpoint that open tasks are for."""
    tasks: dict[tuple[str, str], list[Task]] = {}
    for job in jobs:
        for task in job.tasks:
            if not task.state.ended:
                tasks.setdefault((task.stage, kind_of(job, task).checkpoint), []).append(task)
    return [_line(*which, each, now_s) for which, each in sorted(tasks.items())]


def _line(stage: str, checkpoint: str, tasks: Sequence[Task], now_s: float) -> QueueLine:
    def count(state: TaskState) -> int:
        return sum(task.state is state for task in tasks)

    queued_s = [task.queue_time_s for task in tasks if task.state is TaskState.QUEUED]
    return QueueLine(
        stage=stage,
        checkpoint=checkpoint,
        waiting=len(queued_s),
        blocked=count(TaskState.BLOCKED),
        leased=count(TaskState.LEASED),
        oldest_age_s=max(0.0, now_s - min(queued_s)) if queued_s else 0.0,
    )
