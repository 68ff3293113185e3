"""What clients ask for: jobs made, told, watched and cancelled."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fanlight.errors import (
    AlreadyExists,
    FanlightError,
    InvalidField,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from services.gateway.app.callers import OPERATOR, Caller
from services.gateway.app.core import Core
from services.gateway.app.filters import EVERYTHING, Only
from services.gateway.app.hub import News, Progress
from services.gateway.app.idempotency import Requests
from services.gateway.app.ids import is_id, new_id
from services.gateway.app.new_job import NewJob
from services.gateway.app.new_work import Planner
from services.gateway.jobs import machine, plan
from services.gateway.jobs.deliveries import Delivery
from services.gateway.jobs.model import Job
from services.kernel.logs import get_logger

log = get_logger()

PAGE_SIZE = 50
LOOK_AGAIN_S = 15.0
PAGE_SIZE_LIMIT = 1_000
# How many are read at a time: nobody else is answered while they are decoded.
READ_LIMIT = 100
# How many jobs are looked through for one page of those in a state.
LOOK_LIMIT = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    jobs: Sequence[Job]
    # Empty on the last page.
    next_token: str


class Jobs:
    def __init__(self, core: Core, requests: Requests, planner: Planner) -> None:
        self._ledger = core.ledger
        self._leases = core.leases
        self._waiting = core.waiting
        self._hub = core.hub
        self._workers = core.workers
        self._webhooks = core.webhooks
        self._clock = core.clock
        self._random_bytes = core.random_bytes
        self._settings = core.settings
        self._requests = requests
        self._planner = planner
        self._reserved = 0
        self._draining = False

    def drain(self) -> None:
        self._draining = True
        self._hub.wake_all()

    async def create(self, new: NewJob, caller: Caller = OPERATOR) -> Job:
        """Keep the images, then the job; durable on return. The same request id and content gives the first job.

        NotFound: no such blob. AlreadyExists: the request id was used for something else. ResourceExhausted: too
        many tasks wait.
        """
        first = await self._requests.job_of(new.request_id, new.content_digest, caller.tenant)
        if first is not None and (job := await self._find(first)) is not None:
            return job
        self._webhooks.check(new.webhook_url, caller.tenant)
        with self._room_for(new.draft.tasks_limit):
            made = await self._plan(new, caller)
            claim = self._requests.claim(new.request_id, new.content_digest, caller.tenant, made.id)
            try:
                job = await self._ledger.create(made, after=claim)
            except AlreadyExists:
                return await self._of_first(new, made, caller)
        log.info("job_created", job=job.name, tasks=len(job.tasks), cached=sum(i.cached for i in job.control_images))
        return job

    async def _of_first(self, new: NewJob, made: Job, caller: Caller) -> Job:
        """The job of whoever had the request id first; made here if its gateway died before it could. AlreadyExists."""
        job_id = await self._requests.job_of(new.request_id, new.content_digest, caller.tenant)
        if job_id is None:
            raise Unavailable("the request id is just being forgotten", retry_after_s=1.0)
        try:
            return await self._ledger.create(replace(made, id=job_id))
        except AlreadyExists:
            return await self.get(f"jobs/{job_id}", caller)

    async def create_each(self, news: Sequence[NewJob | FanlightError], caller: Caller) -> list[Job | FanlightError]:
        """Each for itself; what was refused already stays so."""
        return [await self._create_or_refuse(new, caller) for new in news]

    async def _create_or_refuse(self, new: NewJob | FanlightError, caller: Caller) -> Job | FanlightError:
        if isinstance(new, FanlightError):
            return new
        try:
            return await self.create(new, caller)
        except FanlightError as error:
            return error

    async def _plan(self, new: NewJob, caller: Caller) -> Job:
        draft = await self._planner.plan(new.draft, caller)
        now_s = self._clock.now_s()
        return plan.create(
            draft,
            job_id=new_id(now_s, self._random_bytes),
            request_id=new.request_id,
            priority=new.priority,
            now_s=now_s,
            made_before=await self._planner.made_before(draft),
            tenant=caller.tenant,
            deadline_s=now_s + new.deadline_s if new.deadline_s else 0.0,
            webhook_url=new.webhook_url,
        )

    @contextmanager
    def _room_for(self, tasks: int) -> Iterator[None]:
        """Keep that many places among the waiting tasks while a job is made. ResourceExhausted."""
        limit = self._settings.waiting_tasks_limit
        if self._waiting.count + self._reserved + tasks > limit:
            raise ResourceExhausted(
                f"{self._waiting.count} tasks are waiting and {limit} may; try again later",
                retry_after_s=self._settings.retry_after_s,
            )
        self._reserved += tasks
        try:
            yield
        finally:
            self._reserved -= tasks

    async def _find(self, job_id: str) -> Job | None:
        try:
            return self._leases.with_progress(await self._ledger.get(job_id))
        except NotFound:
            return None

    async def get(self, name: str, caller: Caller = OPERATOR) -> Job:
        """By its name `jobs/{id}`. NotFound, also for another tenant's."""
        job = await self._ledger.get(_id_of(name))
        if not caller.sees(job):
            raise NotFound("there is no such job", field="name")
        return self._leases.with_progress(job)

    async def list(
        self, *, page_size: int, page_token: str, only: Only = EVERYTHING, caller: Caller = OPERATOR
    ) -> Page:
        """Newest first; `page_size` 0 is the default one. A page may be short of jobs and yet not be the last.

        InvalidField for a token that no page gave.
        """
        if page_token and not is_id(page_token):
            raise InvalidField("is no token that a page gave", field="page_token")
        size = min(page_size or PAGE_SIZE, PAGE_SIZE_LIMIT)
        found: list[Job] = []
        looked, before = 0, page_token
        limit = min(size, READ_LIMIT)
        while looked < LOOK_LIMIT:
            jobs = await self._ledger.page(before=before, limit=limit)
            for before, job in jobs:
                if job is not None and caller.sees(job) and only.takes(job):
                    found.append(self._leases.with_progress(job))
                if len(found) == size:
                    return Page(jobs=found, next_token=before)
            looked += len(jobs)
            if len(jobs) < limit:
                return Page(jobs=found, next_token="")
        return Page(jobs=found, next_token=before)

    async def cancel(self, name: str, caller: Caller = OPERATOR) -> Job:
        """Cancel what has not ended; an ended job stays as it is. NotFound."""
        await self.get(name, caller)
        now_s = self._clock.now_s()
        return await self._ledger.change(_id_of(name), lambda job: machine.cancel(job, now_s=now_s))

    async def webhook(self, name: str, caller: Caller = OPERATOR) -> Delivery:
        """How the telling of its end goes. NotFound."""
        return await self._webhooks.get(await self.get(name, caller))

    async def watch(
        self, name: str, *, after_revision: int = 0, caller: Caller = OPERATOR
    ) -> AsyncIterator[Job | Progress]:
        """States after that revision, the newest only where several came at once, and progress, until the job has
        ended. NotFound; Unavailable when the gateway stops.
        """
        with self._hub.subscribed(_id_of(name)) as news:
            told: Sequence[Job | Progress] = [await self.get(name, caller)]
            while True:
                for each in told:
                    if isinstance(each, Progress):
                        yield each
                        continue
                    if each.revision > after_revision:
                        after_revision = each.revision
                        yield self._leases.with_progress(each)
                    if each.state.ended:
                        return
                if self._draining:
                    raise Unavailable("the gateway is stopping; watch again", retry_after_s=1.0)
                told = await self._following(news, name, caller)

    async def _following(self, news: News, name: str, caller: Caller) -> Sequence[Job | Progress]:
        """What comes next; where nothing does, the job again: no watch depends on a message that got lost."""
        try:
            async with asyncio.timeout(LOOK_AGAIN_S):
                await news.came.wait()
        except TimeoutError:
            return [await self.get(name, caller)]
        return news.take()

    async def wait(self, name: str, *, wait_s: float, caller: Caller = OPERATOR) -> Job:
        """The job once it has ended, or as it is when the wait is over or the gateway stops. NotFound."""
        with self._hub.subscribed(_id_of(name)) as news:
            job = await self.get(name, caller)
            try:
                async with asyncio.timeout(wait_s):
                    while not (job.state.ended or self._draining):
                        await news.came.wait()
                        job = next((each for each in news.take() if isinstance(each, Job)), job)
            except TimeoutError:
                return await self.get(name, caller)
        return job


def _id_of(name: str) -> str:
    prefix, _, job_id = name.partition("/")
    if prefix != "jobs" or not job_id:
        raise NotFound("must be jobs/{id}", field="name")
    return job_id
