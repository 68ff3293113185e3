"""The gateway's app with jobs in a dictionary, changed by the test. For what translates to and from it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fanlight.contract.parameters import Parameter
from fanlight.errors import FanlightError, NotFound, Unavailable
from services.gateway.app.explain import JobExplanation
from services.gateway.app.jobs import ALL_JOBS, JobFilter, Page
from services.gateway.app.queue_index import QueueLine
from services.gateway.app.quotas import Quotas
from services.gateway.app.records import Records
from services.gateway.app.submission import NewJob
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.app.watch import TaskProgress
from services.gateway.config import GatewaySettings
from services.gateway.domain import plan
from services.gateway.domain.fleet_catalog import FleetCatalog, catalog_of
from services.gateway.domain.job import Job, JobState
from services.gateway.domain.workers import (
    AnnouncedAnnotator,
    AnnouncedModel,
    Capabilities,
    LeftOutOfFleet,
    WorkerStatus,
)
from tests.fakes.audit import audit_log
from tests.fakes.fleet import FakeClock, annotation, plan_of
from tests.fakes.memory_store import MemoryStore

CANNY = AnnouncedAnnotator(
    id="canny",
    parameters=(
        Parameter(name="low_threshold", default=100, minimum=0, maximum=255),
        Parameter(name="gray", default=False),
        Parameter(name="sigma", default=0.5),
        Parameter(name="mode", default="fast", choices=("fast", "fine")),
    ),
    controlnets=("canny",),
    version="1",
)
STARTER = AnnouncedModel(
    id="starter",
    kind="checkpoint",
    is_default=True,
    pipelines=("text2img", "controlnet"),
    width_px=256,
    height_px=256,
    size_step_px=8,
    family="starter",
    schedulers=("ddim",),
)
STARTER_CANNY = AnnouncedModel(id="canny", kind="controlnet", family="starter")


class FakeJobs:
    def __init__(self) -> None:
        self.kept: dict[str, Job] = {}
        self.created: list[NewJob] = []
        # Raised by the next `create`.
        self.refusal: FanlightError | None = None
        # What a waiting call makes of the job; None lets it stay as it is.
        self.ending: Job | None = None
        self.stopped = False
        # How many watch a job just now.
        self.watchers = 0
        # Set when the last of them has gone.
        self.unwatched = asyncio.Event()
        # The jobs that nobody may be told of yet.
        self.unwritten: set[str] = set()
        self._changed = asyncio.Event()
        self._told: list[tuple[str, TaskProgress]] = []

    async def create(self, new: NewJob, caller: Caller = OPERATOR, *, is_waited_for: bool = False) -> Job:
        if self.refusal is not None:
            raise self.refusal
        for job in self.kept.values():
            if new.request_id and job.request_id == new.request_id:
                return job
        self.created.append(new)
        job = a_job(str(len(self.kept) + 1), new=new, request_id=new.request_id, priority=new.priority)
        if is_waited_for:
            self.unwritten.add(job.name)
        self.change(job)
        return job

    async def keep(self, job: Job) -> None:
        self.unwritten.discard(job.name)

    async def create_each(self, news: Sequence[NewJob | FanlightError], caller: Caller) -> list[Job | FanlightError]:
        return [new if isinstance(new, FanlightError) else await self.create(new, caller) for new in news]

    async def get(self, name: str, caller: Caller = OPERATOR) -> Job:
        if name not in self.kept or not caller.sees(self.kept[name]):
            raise NotFound(f"no job {name}", field="name")
        return self.kept[name]

    async def list(
        self, *, page_size: int, page_token: str, only: JobFilter = ALL_JOBS, caller: Caller = OPERATOR
    ) -> Page:
        names = sorted(self.kept, reverse=True)
        start = names.index(page_token) + 1 if page_token else 0
        end = start + (page_size or 50)
        jobs = [
            self.kept[name]
            for name in names[start:end]
            if only.matches(self.kept[name]) and caller.sees(self.kept[name])
        ]
        return Page(jobs=jobs, next_token=names[end - 1] if end < len(names) else "")

    async def cancel(self, name: str, caller: Caller = OPERATOR) -> Job:
        job = await self.get(name, caller)
        if not job.state.ended:
            self.change(replace(job, state=JobState.CANCELLED, revision=job.revision + 1))
        return self.kept[name]

    async def wait(self, name: str, *, wait_s: float, caller: Caller = OPERATOR) -> Job:
        job = await self.get(name, caller)
        if self.ending is not None and wait_s:
            self.change(replace(self.ending, id=job.id, revision=job.revision + 1))
        return self.kept[name]

    async def watch(
        self, name: str, *, after_revision: int = 0, caller: Caller = OPERATOR
    ) -> AsyncIterator[Job | TaskProgress]:
        self.watchers += 1
        try:
            async for each in self._watch(name, after_revision):
                yield each
        finally:
            self.watchers -= 1
            if not self.watchers:
                self.unwatched.set()

    async def _watch(self, name: str, after_revision: int) -> AsyncIterator[Job | TaskProgress]:
        told = len(self._told)
        while True:
            changed = self._changed
            job = await self.get(name)
            for of, progress in self._told[told:]:
                if of == name:
                    yield progress
            told = len(self._told)
            if job.revision > after_revision:
                after_revision = job.revision
                yield job
            if job.state.ended:
                return
            if self.stopped:
                raise Unavailable("the gateway stops")
            await changed.wait()

    def change(self, job: Job) -> None:
        self.kept[job.name] = job
        self._wake()

    def progress(self, name: str, progress: TaskProgress) -> None:
        self._told.append((name, progress))
        self._wake()

    def stop(self) -> None:
        self.stopped = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class FakeWorkers:
    def __init__(self) -> None:
        self.capabilities = Capabilities(annotators=(CANNY,), models=(STARTER, STARTER_CANNY))
        self.known: list[WorkerStatus] = []

    def catalog(self) -> FleetCatalog:
        return catalog_of(["preprocess", "diffusion"], [self.capabilities])

    def can_any(self, stage: str, needs: frozenset[str], amounts: Any = (), *, only_live: bool = False) -> bool:
        return needs <= self.capabilities.offers

    def offering(self, stage: str, need: str) -> Sequence[str]:
        return ["node"] if need in self.capabilities.offers else []

    def limits_of(self, stage: str, name: str, needs: frozenset[str] = frozenset()) -> Sequence[tuple[str, int | None]]:
        return [("node", None)]

    def residency_of(self, kind: str, name: str) -> int:
        return self.catalog().residency_of(kind, name)

    def left_out(self) -> LeftOutOfFleet:
        found = self.capabilities.left_out
        return LeftOutOfFleet(listed=tuple((each, ("node",)) for each in found), count=len(found))

    def statuses(self) -> Sequence[WorkerStatus]:
        return self.known

    @property
    def offers(self) -> "FakeWorkers":
        return self


@dataclass
class FakeQueue:
    lines: list[QueueLine] = field(default_factory=list)

    def statistics(self, caller: Caller = OPERATOR) -> Sequence[QueueLine]:
        return self.lines


class FakeProbe:
    async def write(self) -> None:
        return


class FakeExplanations:
    """Knows nothing but the job."""

    def with_estimate(self, news: Any) -> Any:
        return news

    async def with_estimates(self, news: Sequence[Any]) -> list[Any]:
        return list(news)

    def of(self, job: Job) -> JobExplanation:
        return JobExplanation(job=job, summary="it waits", tasks=())


class FakeGateway:
    def __init__(self) -> None:
        self.jobs = FakeJobs()
        self.workers = FakeWorkers()
        self.queue = FakeQueue()
        self.explanations = FakeExplanations()
        self.probe = FakeProbe()
        self.ready = True
        clock = FakeClock()
        store = Records(MemoryStore(), clock)
        self.audit = audit_log(store, clock)
        self.quotas = Quotas(store, clock, GatewaySettings(), self.audit)


def a_job(id_: str, *, new: NewJob | None = None, request_id: str = "", priority: int = 0) -> Job:
    """Without tasks."""
    job = plan.create(plan_of(new or annotation()), job_id=id_, request_id=request_id, priority=priority, now_s=1_000.0)
    return replace(job, tasks=())
