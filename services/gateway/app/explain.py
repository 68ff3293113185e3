"""Why a job waits and how long it should still take. Reads the scheduler; decides nothing."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from services.gateway.app.core import Core
from services.gateway.domain.blame import stage_need
from services.gateway.domain.job import Job, JobEstimate, Task, TaskState
from services.gateway.scheduler.explain import PassedOver, Verdict, explain, missing_of, name_list, place_of
from services.gateway.scheduler.queue import TaskKind, WaitingTask

TASKS_LIMIT = 8
WORKERS_LIMIT = 50
ESTIMATES_AT_A_TIME = 20

News = TypeVar("News")


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


class Explainer:
    def __init__(self, core: Core) -> None:
        self._scheduler = core.scheduler
        self._queue_index = core.queue_index
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
        waiting = self._queue_index.find(key)
        backoff_s = self._queue_index.backoff_left_s(key)
        if waiting is None or backoff_s or key not in self._scheduler:
            why = self._why_not_offered(waiting, backoff_s)
            needs = _needs(waiting.kind) if waiting else ()
            return TaskExplanation(task=task.number, stage=task.stage, why=why, needs=needs)
        explained = explain(self._scheduler, waiting, self._clock.monotonic_s())
        not_there = self._not_there(task.stage, waiting.kind)
        workers = [*(self._with_reasons(each, waiting.kind) for each in explained.workers), *not_there]
        could = [each.node for each in not_there if each.verdict is Verdict.AWAY and not each.missing]
        why = explained.why
        if explained.place is None and could:
            why = f"{why}; {name_list(could)}, which {'are' if len(could) > 1 else 'is'} away, could do it"
        if task.awaits_second_opinion:
            why = f"{task.refusals[0].node} says that the request is at fault, and another node is asked; {why}"
        return TaskExplanation(
            task=task.number,
            stage=task.stage,
            why=why,
            needs=_needs(waiting.kind),
            worker=explained.place.worker if explained.place else "",
            tasks_ahead=explained.tasks_ahead,
            workers=workers[:WORKERS_LIMIT],
            workers_left_out=max(0, len(workers) - WORKERS_LIMIT),
        )

    def _why_not_offered(self, waiting: WaitingTask | None, backoff_s: float) -> str:
        if backoff_s:
            return f"its last attempt failed; the retry starts in {backoff_s:.0f} s"
        source, left_s = self._queue_index.source_of(waiting) if waiting else ("", 0.0)
        if source:
            why = f"no worker holds all that it needs, and {source} could not be reached"
            return f"{why}; the retry starts in {left_s:.0f} s"
        return "it is being leased"

    def _with_reasons(self, passed: PassedOver, kind: TaskKind) -> PassedOver:
        """Why such tasks go to other workers first, and until when."""
        if passed.verdict is not Verdict.AVOIDED:
            return passed
        now_s, needs = self._clock.now_s(), {*kind.parts, stage_need(kind.stage)}
        reasons = [
            f"{each.need}: {each.why}; for {max(0.0, each.until_s - now_s):.0f} s more"
            for each in self._workers.avoidances_of(passed.worker)
            if each.need in needs
        ]
        return replace(passed, why=f"{passed.why} ({'; '.join(reasons)})") if reasons else passed

    def _not_there(self, stage: str, kind: TaskKind) -> list[PassedOver]:
        """Known workers of the stage that the scheduler does not count on."""
        passed = []
        for status in self._workers.statuses(of_all=True):
            worker = status.worker
            if worker.stage != stage or self._scheduler.worker(worker.id) is not None:
                continue
            is_leaving = worker.draining
            abilities = self._workers.offers.abilities_of(worker.id)
            missing: tuple[str, ...] = ()
            if is_leaving:
                verdict, why = Verdict.DRAINING, "it is leaving"
            elif abilities is None:
                verdict, why = Verdict.AWAY, "a newer worker of its node is there instead"
                missing = tuple(sorted(kind.needs))
            else:
                unoffered, too_low = missing_of(*abilities, kind)
                missing = (*unoffered, *too_low)
                verdict, why = Verdict.AWAY, "it has not called lately"
                why += f", and it lacks {name_list(missing)}" if missing else "; it could do it"
            passed.append(PassedOver(worker=worker.id, node=worker.node, verdict=verdict, why=why, missing=missing))
        return passed

    def with_estimate(self, news: News) -> News:
        """A job with its estimate, where there is one; anything else as it is."""
        if not isinstance(news, Job) or news.state.ended:
            return news
        return replace(news, estimate=self._estimate(news))

    async def with_estimates(self, news: Sequence[News]) -> list[News]:
        """For many jobs; other calls are answered in between, since an estimate looks at hundreds of workers."""
        estimated: list[News] = []
        for number, each in enumerate(news):
            if number % ESTIMATES_AT_A_TIME == 0:
                await asyncio.sleep(0)
            estimated.append(self.with_estimate(each))
        return estimated

    def _estimate(self, job: Job) -> JobEstimate | None:
        now_s = self._clock.monotonic_s()
        queued = [task for task in job.tasks if task.state is TaskState.QUEUED]
        waiting = [each for task in queued if (each := self._queue_index.find((job.id, task.number)))]
        places = [place_of(self._scheduler, each, now_s) for each in waiting if each.key in self._scheduler]
        found = [place for place in places if place is not None]
        left_s = [self._scheduler.left_s((job.id, task.number), now_s) for task in job.tasks]
        blocked_s = self._blocked_s(job, now_s)
        if len(found) < len(queued) or blocked_s is None:
            return None
        slowest = max(found, key=lambda place: place.estimate.finish_s, default=None)
        finish_s = slowest.estimate.finish_s if slowest else 0.0
        return JobEstimate(
            tasks_ahead=min((self._scheduler.queues.position(each) for each in waiting), default=0),
            ready_s=max(finish_s, *left_s) + blocked_s,
            fetch_bytes=slowest.estimate.fetch_bytes if slowest else 0,
            fetch_s=slowest.estimate.fetch_s if slowest else 0.0,
            node=slowest.node if slowest else "",
            link_bps=slowest.link_bps if slowest else 0.0,
        )

    def _blocked_s(self, job: Job, now_s: float) -> float | None:
        """What its blocked tasks take once they can begin; None where no worker can do them."""
        blocked = [task for task in job.tasks if task.state is TaskState.BLOCKED]
        if not blocked:
            return 0.0
        return self._scheduler.would_finish_s(self._queue_index.as_waiting(job, blocked[0]), now_s)


def _needs(kind: TaskKind) -> list[str]:
    """As text."""
    return [*sorted(kind.needs), *(f"{name} >= {amount}" for name, amount in kind.amounts)]


def _summary(job: Job, tasks: Sequence[TaskExplanation]) -> str:
    if job.state.ended:
        return f"it has ended: {job.state.value}"
    if not tasks and any(task.state is TaskState.JUDGING for task in job.tasks):
        return "its results wait for the operator's moderation"
    if not tasks:
        return "all its tasks are running"
    return f"task {tasks[0].task} waits: {tasks[0].why}"
