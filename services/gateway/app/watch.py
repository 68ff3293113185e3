"""Publishes job states and task progress to watchers. A slow watcher gets only the newest of each."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from services.gateway.domain.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchStatus:
    """Weights on their way to the task's worker. `seconds_left` is None while unknown."""

    reference: str
    done_bytes: int
    total_bytes: int
    goodput_bps: float
    seconds_left: float | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress:
    """The progress of a task; best effort."""

    task: int
    step: int
    steps: int
    preview: bytes = field(default=b"", repr=False)
    fetching: FetchStatus | None = None


class Subscription:
    """What was published to one watcher and not taken yet: the newest job, each task's newest progress and preview."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._progress: dict[int, TaskProgress] = {}
        self.arrived = asyncio.Event()

    def publish(self, news: Job | TaskProgress) -> None:
        if isinstance(news, Job):
            self._job = news
        else:
            before = self._progress.get(news.task)
            self._progress[news.task] = news if before is None else _after(before, news)
        self.arrived.set()

    def take(self) -> list[Job | TaskProgress]:
        """What was published since the last time, progress first."""
        self.arrived.clear()
        news: list[Job | TaskProgress] = [*self._progress.values(), *([self._job] if self._job else [])]
        self._job, self._progress = None, {}
        return news


def _after(before: TaskProgress, news: TaskProgress) -> TaskProgress:
    """The news, with the preview from before while it has none itself: one that was not taken yet is not lost."""
    return news if news.preview else replace(news, preview=before.preview)


class JobPublisher:
    """Publishes by job id to the subscriptions of its watchers."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, list[Subscription]] = {}

    def publish(self, job_id: str, news: Job | TaskProgress) -> None:
        for each in self._subscriptions.get(job_id, ()):
            each.publish(news)

    def wake_all(self) -> None:
        for watchers in self._subscriptions.values():
            for each in watchers:
                each.arrived.set()

    @contextmanager
    def subscribed(self, job_id: str) -> Iterator[Subscription]:
        subscription = Subscription()
        self._subscriptions.setdefault(job_id, []).append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions[job_id].remove(subscription)
            if not self._subscriptions[job_id]:
                del self._subscriptions[job_id]
