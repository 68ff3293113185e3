"""Tells those who watch a job what happens to it. What waits for a slow watcher is bounded: only the last counts."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.gateway.jobs.model import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """Weights on their way to the task's worker. `seconds_left` is None while unknown."""

    reference: str
    done_bytes: int
    total_bytes: int
    goodput_bps: float
    seconds_left: float | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a task is; best effort."""

    task: int
    step: int
    steps: int
    preview: bytes = field(default=b"", repr=False)
    fetching: Fetching | None = None


class News:
    def __init__(self) -> None:
        self._job: Job | None = None
        self._progress: dict[int, Progress] = {}
        self.came = asyncio.Event()

    def tell(self, news: Job | Progress) -> None:
        if isinstance(news, Job):
            self._job = news
        else:
            self._progress[news.task] = news
        self.came.set()

    def take(self) -> list[Job | Progress]:
        """What came since the last time, progress first."""
        self.came.clear()
        news: list[Job | Progress] = [*self._progress.values(), *([self._job] if self._job else [])]
        self._job, self._progress = None, {}
        return news


class Hub:
    def __init__(self) -> None:
        self._news: dict[str, list[News]] = {}

    def tell(self, job_id: str, news: Job | Progress) -> None:
        for each in self._news.get(job_id, ()):
            each.tell(news)

    def wake_all(self) -> None:
        for watchers in self._news.values():
            for each in watchers:
                each.came.set()

    @contextmanager
    def subscribed(self, job_id: str) -> Iterator[News]:
        news = News()
        self._news.setdefault(job_id, []).append(news)
        try:
            yield news
        finally:
            self._news[job_id].remove(news)
            if not self._news[job_id]:
                del self._news[job_id]
