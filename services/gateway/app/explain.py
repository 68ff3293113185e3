"""Why a job waits and how long it should still take, for those who ask. Decides nothing."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from services.gateway.app.core import Core
from services.gateway.jobs.model import Job, JobEstimate, Task, TaskState
from services.gateway.ordering.explain import PassedOver, Verdict, explain, place_of
from services.gateway.ordering.tasks import Kind

TASKS_LIMIT = 8
WORKERS_LIMIT = 50
ESTIMATES_AT_A_TIME = 20

Other = TypeVar("Other")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExplanation:
    task: int
    stage: str
    why: str
    needs: Sequence[str]
    worker: str = ""
    tasks_ahead: int = 0
    workers: Sequence[PassedOver] = ()
    workers_left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobExplanation:
    job: Job
    summary: str
    tasks: Sequence[TaskExplanation]


class Explanations:
    def __init__(self, core: Core) -> None:
        self._board = core.board
        self._waiting = core.waiting
        self._workers = core.workers
        self._clock = core.clock

    def of(self, job: Job) -> JobExplanation:
        waiting = [task for task in job.tasks if task.state in (TaskState.BLOCKED, TaskState.QUEUED)]
        tasks = [self._of_task(job, task) for task in waiting[:TASKS_LIMIT]]
        return JobExplanation(job=self.with_estimate(job), summary=_summary(job, tasks), tasks=tasks)

    def _of_task(self, job: Job, task: Task) -> TaskExplanation:
        if task.state is TaskState.BLOCKED:
            return TaskExplanation(
                task=task.number, stage=task.stage, why="its control images are not made yet", needs=()
            )
        key = (job.id, task.number)
        waiting = self._waiting.find(key)
        pause_s = self._waiting.pause_s(key)
        if waiting is None or pause_s or key not in self._board:
            why = (
                f"its last try came to nothing; the next comes in {pause_s:.0f} s" if pause_s else "it is being leased"
            )
            needs = _needs(waiting.kind) if waiting else ()
            return TaskExplanation(task=task.number, stage=task.stage, why=why, needs=needs)
        explained = explain(self._board, waiting, self._clock.monotonic_s())
        workers = [*explained.workers, *self._not_there(task.stage)]
        return TaskExplanation(
            task=task.number,
            stage=task.stage,
            why=explained.why,
            needs=_needs(waiting.kind),
            worker=explained.place.worker if explained.place else "",
            tasks_ahead=explained.tasks_ahead,
            workers=workers[:WORKERS_LIMIT],
            workers_left_out=max(0, len(workers) - WORKERS_LIMIT),
        )

    def _not_there(self, stage: str) -> list[PassedOver]:
        """Workers of the stage that are known, and not counted on."""
        passed = []
        for status in self._workers.statuses():
            worker = status.worker
            if worker.stage != stage or self._board.post(worker.id) is not None:
                continue
            is_leaving = worker.draining or status.draining_reason
            why = status.draining_reason or ("it is leaving" if worker.draining else "it has not been heard of lately")
            verdict = Verdict.DRAINING if is_leaving else Verdict.AWAY
            passed.append(PassedOver(worker=worker.id, node=worker.node, verdict=verdict, why=why))
        return passed

    def with_estimate(self, job: Job) -> Job:
        """The job with how long it should still take, where anybody can tell."""
        return job if job.state.ended else replace(job, estimate=self._estimate(job))

    def told(self, news: Job | Other) -> Job | Other:
        """What clients are told: a job with its estimate, anything else as it is."""
        return self.with_estimate(news) if isinstance(news, Job) else news

    async def all_told(self, news: Sequence[Job | Other]) -> list[Job | Other]:
        """Each of many, while others are answered in between: an estimate looks at hundreds of workers."""
        told: list[Job | Other] = []
        for number, each in enumerate(news):
            if number % ESTIMATES_AT_A_TIME == 0:
                await asyncio.sleep(0)
            told.append(self.told(each))
        return told

    def _estimate(self, job: Job) -> JobEstimate | None:
        now_s = self._clock.monotonic_s()
        queued = [task for task in job.tasks if task.state is TaskState.QUEUED]
        waiting = [each for task in queued if (each := self._waiting.find((job.id, task.number)))]
        places = [place_of(self._board, each, now_s) for each in waiting if each.key in self._board]
        found = [place for place in places if place is not None]
        left_s = [self._board.left_s((job.id, task.number), now_s) for task in job.tasks]
        blocked_s = self._blocked_s(job, now_s)
        if len(found) < len(queued) or blocked_s is None:
            return None
        slowest = max(found, key=lambda place: place.estimate.finish_s, default=None)
        finish_s = slowest.estimate.finish_s if slowest else 0.0
        return JobEstimate(
            tasks_ahead=min((self._board.lines.place(each) for each in waiting), default=0),
            ready_s=max(finish_s, *left_s) + blocked_s,
            fetch_bytes=slowest.estimate.fetch_bytes if slowest else 0,
            fetch_s=slowest.estimate.fetch_s if slowest else 0.0,
            node=slowest.node if slowest else "",
            link_bps=slowest.link_bps if slowest else 0.0,
        )

    def _blocked_s(self, job: Job, now_s: float) -> float | None:
        """What its blocked tasks take once they can begin; None where nobody can do them."""
        blocked = [task for task in job.tasks if task.state is TaskState.BLOCKED]
        if not blocked:
            return 0.0
        return self._board.would_finish_s(self._waiting.as_waiting(job, blocked[0]), now_s)


def _needs(kind: Kind) -> list[str]:
    """In words."""
    return [*sorted(kind.needs), *(f"{name} >= {amount}" for name, amount in kind.amounts)]


def _summary(job: Job, tasks: Sequence[TaskExplanation]) -> str:
    if job.state.ended:
        return f"it has ended: {job.state.value}"
    if not tasks:
        return "all its tasks are running"
    return f"task {tasks[0].task} waits: {tasks[0].why}"
