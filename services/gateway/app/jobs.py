"""What clients do with jobs: create, get, list, watch, wait for and cancel them.

What a request means is checked in `wire`, how a job changes is in `domain.machine`.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fanlight.errors import (
    AlreadyExists,
    FailedPrecondition,
    FanlightError,
    InvalidField,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from services.gateway.app.audit_log import THE_GATEWAY, acting
from services.gateway.app.core import Core
from services.gateway.app.job_store import IdempotencyKeys
from services.gateway.app.leases import RandomBytes
from services.gateway.app.moderation import Moderation
from services.gateway.app.submission import JobPlanner, NewJob
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.app.watch import Subscription, TaskProgress
from services.gateway.domain import machine, plan
from services.gateway.domain.delivery import Delivery
from services.gateway.domain.job import Job, JobState
from services.gateway.domain.moderation import Policy, stricter
from services.gateway.domain.nodes import pool_need
from services.kernel.logs import get_logger

log = get_logger()

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_ID = re.compile(f"[{_ALPHABET}]{{26}}")
PAGE_SIZE = 50
WATCH_REFRESH_S = 15.0
PAGE_SIZE_LIMIT = 1_000
# How many are read at a time: no other call is answered while they are decoded.
READ_LIMIT = 100
# As an error says it.
STREAMS = "watches and waits"
# How many jobs are searched for one page.
SEARCH_LIMIT = 5_000


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def new_id(now_s: float, random_bytes: RandomBytes) -> str:
    """A ULID: 48 bits of milliseconds, then 80 random bits, in 26 characters. Ids sort by the time they were made."""
    value = int(now_s * 1000) << 80 | int.from_bytes(random_bytes(10))
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs a list contains. What is None, empty or 0 matches all."""

    state: JobState | None = None
    model: str = ""
    annotator: str = ""
    tenant: str = ""
    created_from_s: float = 0.0
    created_before_s: float = 0.0

    def matches(self, job: Job) -> bool:
        return (
            job.check is None
            and (self.state is None or job.state is self.state)
            and (not self.tenant or job.tenant == self.tenant)
            and (not self.model or job.request.facts.checkpoint == self.model)
            and (not self.annotator or job.request.facts.annotator == self.annotator)
            and self.created_from_s <= job.create_time_s
            and (not self.created_before_s or job.create_time_s < self.created_before_s)
        )


ALL_JOBS = JobFilter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    jobs: Sequence[Job]
    # Empty on the last page.
    next_token: str


class Jobs:
    def __init__(self, core: Core, requests: IdempotencyKeys, planner: JobPlanner, moderation: Moderation) -> None:
        self._job_store = core.job_store
        self._leases = core.leases
        self._queue_index = core.queue_index
        self._hub = core.hub
        self._workers = core.workers
        self._webhooks = core.webhooks
        self._quotas = core.quotas
        self._audit = core.audit
        self._clock = core.clock
        self._random_bytes = core.random_bytes
        self._settings = core.settings
        self._limits = core.limits
        self._requests = requests
        self._planner = planner
        self._moderation = moderation
        self._reserved: Counter[str] = Counter()
        self._draining = False
        pairs = filter(None, core.settings.tenant_pools.split(","))
        self._tenant_pools = {tenant: pool for tenant, _, pool in (pair.partition("=") for pair in pairs)}

    def drain(self) -> None:
        self._draining = True
        self._hub.wake_all()

    async def create(self, new: NewJob, caller: Caller = OPERATOR) -> Job:
        """Store the images, then the job; durable on return. The same request id and content returns the original job.

        NotFound: no such blob. AlreadyExists: the request id was used with other content. ResourceExhausted: too
        many tasks wait. ContentBlocked, ModerationUnavailable: the operator's moderation does not let it pass.
        """
        first = await self._requests.job_of(new.request_id, new.content_digest, caller.tenant)
        if first is not None and (job := await self._find(first)) is not None:
            return job
        self._webhooks.check(new.webhook_url, caller.tenant)
        if new.webhook_url:
            self._require_webhook_place(caller)
        self._require_blob_bytes(new, caller)
        with self._room_for(new.draft.tasks_limit, caller):
            made = await self._plan(new, caller)
            if self._quotas.is_closed(caller.tenant):
                raise FailedPrecondition(f"the tenant {caller.tenant} is being deleted")
            claim = self._requests.claim(new.request_id, new.content_digest, caller.tenant, made.id)
            try:
                job = await self._job_store.create(made, after=claim)
            except AlreadyExists:
                return await self._of_first(new, made, caller)
        log.info("job_created", job=job.name, tasks=len(job.tasks), cached=sum(i.cached for i in job.control_images))
        return job

    async def _of_first(self, new: NewJob, made: Job, caller: Caller) -> Job:
        """The job that the request id belongs to; created here if its gateway died before it could. AlreadyExists."""
        job_id = await self._requests.job_of(new.request_id, new.content_digest, caller.tenant)
        if job_id is None:
            raise Unavailable("the request id is just being deleted", retry_after_s=1.0)
        try:
            return await self._job_store.create(replace(made, id=job_id))
        except AlreadyExists:
            return await self.get(f"jobs/{job_id}", caller)

    async def create_each(self, news: Sequence[NewJob | FanlightError], caller: Caller) -> list[Job | FanlightError]:
        """Each independently; what was refused already stays refused."""
        return [await self._create_or_refuse(new, caller) for new in news]

    async def _create_or_refuse(self, new: NewJob | FanlightError, caller: Caller) -> Job | FanlightError:
        if isinstance(new, FanlightError):
            return new
        try:
            return await self.create(new, caller)
        except FanlightError as error:
            return error

    async def _plan(self, new: NewJob, caller: Caller) -> Job:
        policy = self._moderation.policy_of(caller.tenant)
        pool = self._pool_of(new, caller)
        draft = await self._planner.plan(new.draft.under(policy), caller)
        self._require_pool(draft, pool)
        verdict = await self._moderation.judge_request(draft, caller.tenant, policy)
        if stricter(verdict.least_policy, policy) is not policy:
            draft = await self._planner.plan(new.draft.under(verdict.least_policy), caller)
            self._require_pool(draft, pool)
        is_judged = self._moderation.is_asked(policy)
        # Of a pool's job no other node's work is used; a result that is judged is made.
        makes_all = bool(pool) or (is_judged and bool(draft.requests[0].facts.annotator))
        now_s = self._clock.now_s()
        made = plan.create(
            draft,
            job_id=new_id(now_s, self._random_bytes),
            request_id=new.request_id,
            priority=new.priority,
            now_s=now_s,
            made_before={} if makes_all else await self._planner.made_before(draft),
            tenant=caller.tenant,
            deadline_s=now_s + new.deadline_s if new.deadline_s else 0.0,
            webhook_url=new.webhook_url,
            pool=pool,
        )
        shown = "" if policy is Policy.OFF else policy.value
        return replace(made, labels=verdict.labels, policy=shown, is_judged=is_judged)

    def _pool_of(self, new: NewJob, caller: Caller) -> str:
        """Empty for any. InvalidField where the tenant is bound to another pool; FailedPrecondition for two."""
        bound = self._quotas.pool_of(caller.tenant) or self._tenant_pools.get(caller.tenant, "")
        checked = self._moderation.pool_of(caller.tenant)
        if bound and checked and bound != checked:
            raise FailedPrecondition(
                f"your jobs are bound to the pool {bound} and by the policy on content to {checked}; ask the operator",
                field="pool",
            )
        bound = bound or checked
        if bound and new.pool not in ("", bound):
            raise InvalidField(f"is {new.pool}; your jobs are bound to the pool {bound}", field="pool")
        return new.pool or bound

    def _require_pool(self, draft: plan.JobPlan, pool: str) -> None:
        """FailedPrecondition where no worker of the pool can do a task."""
        for request in draft.requests if pool else ():
            needs = request.facts.needs | {pool_need(pool)}
            if not self._workers.offers.can_any(request.stage, needs, request.facts.amounts):
                raise FailedPrecondition(
                    f"no worker of the pool {pool} can do this {request.stage} task; leave it out, or invite nodes"
                    f" into it with `fanlight nodes invite --pool {pool}`",
                    field="pool",
                )

    def _require_webhook_place(self, caller: Caller) -> None:
        used = self._webhooks.count_of(caller.tenant)
        self._quotas.require(caller, "webhooks", used, 1, "webhooks waiting", retry_after_s=self._limits.retry_after_s)

    def _require_blob_bytes(self, new: NewJob, caller: Caller) -> None:
        """Its images, and room for results of any size where it is not used up already."""
        size_bytes = sum(len(image.data) for image in new.draft.images)
        self._quotas.require_blob_bytes(caller, size_bytes)

    @contextmanager
    def _room_for(self, tasks: int, caller: Caller) -> Iterator[None]:
        """Reserve that many places among the tenant's waiting tasks while a job is created. ResourceExhausted."""
        total = self._limits.waiting_tasks_total
        if self._queue_index.count + self._reserved.total() + tasks > total:
            raise ResourceExhausted(
                "the gateway has as many waiting tasks as it may have; try again later",
                retry_after_s=self._limits.retry_after_s,
            )
        waiting = self._queue_index.count_of(caller.tenant) + self._reserved[caller.tenant]
        retry_after_s = self._limits.retry_after_s
        self._quotas.require(caller, "waiting_tasks", waiting, tasks, "tasks waiting", retry_after_s=retry_after_s)
        self._reserved[caller.tenant] += tasks
        try:
            yield
        finally:
            self._reserved[caller.tenant] -= tasks
            if not self._reserved[caller.tenant]:
                del self._reserved[caller.tenant]

    def is_creating(self, tenant: str) -> bool:
        """Whether jobs of the tenant are being created here."""
        return self._reserved[tenant] > 0

    async def _find(self, job_id: str) -> Job | None:
        try:
            return self._leases.with_progress(await self._job_store.get(job_id))
        except NotFound:
            return None

    async def get(self, name: str, caller: Caller = OPERATOR) -> Job:
        """By its name `jobs/{id}`. NotFound, also for another tenant's job."""
        job = await self._seen(name, caller)
        await self._audit.note_read("jobs.read", job.name, tenant=job.tenant)
        return self._leases.with_progress(job)

    async def _seen(self, name: str, caller: Caller) -> Job:
        job = await self._job_store.get(_id_of(name))
        if not caller.sees(job):
            raise NotFound("there is no such job", field="name")
        return job

    async def list(
        self, *, page_size: int, page_token: str, only: JobFilter = ALL_JOBS, caller: Caller = OPERATOR
    ) -> Page:
        """Newest first; `page_size` 0 is the default one. A page may have fewer jobs without being the last.

        InvalidField for a token that no page returned.
        """
        if page_token and not is_id(page_token):
            raise InvalidField("is not a token that a page returned", field="page_token")
        size = min(page_size or PAGE_SIZE, PAGE_SIZE_LIMIT)
        found: list[Job] = []
        searched, before = 0, page_token
        limit = min(size, READ_LIMIT)
        while searched < SEARCH_LIMIT:
            jobs = await self._job_store.page(before=before, limit=limit)
            for before, job in jobs:
                if job is not None and caller.sees(job) and only.matches(job):
                    found.append(self._leases.with_progress(job))
                if len(found) == size:
                    return await self._noted(Page(jobs=found, next_token=before), caller)
            searched += len(jobs)
            if len(jobs) < limit:
                before = ""
                break
        return await self._noted(Page(jobs=found, next_token=before), caller)

    async def _noted(self, page: Page, caller: Caller) -> Page:
        others = {job.tenant for job in page.jobs} - {caller.tenant}
        if others:
            tenant = others.pop() if len(others) == 1 else "*"
            await self._audit.note_read("jobs.list", f"tenants/{tenant}/jobs", tenant=tenant)
        return page

    async def cancel(self, name: str, caller: Caller = OPERATOR) -> Job:
        """Cancel a job's unfinished tasks; an ended job stays as it is. NotFound."""
        job = await self._seen(name, caller)
        if job.tenant == caller.tenant or acting.get() is THE_GATEWAY:
            return await self._cancel(job)
        async with self._audit.change("jobs.cancel", job.name, tenant=job.tenant, caller=caller):
            return await self._cancel(job)

    async def ended(self, name: str, caller: Caller) -> Job:
        """The job, cancelled where it had not ended, without an entry of its own: for who deletes it. NotFound."""
        return await self._cancel(await self._seen(name, caller))

    async def _cancel(self, job: Job) -> Job:
        now_s = self._clock.now_s()
        return await self._job_store.change(job.id, lambda job: machine.cancel(job, now_s=now_s))

    async def webhook(self, name: str, caller: Caller = OPERATOR) -> Delivery:
        """The job's webhook delivery, with every attempt. NotFound."""
        return await self._webhooks.get(await self.get(name, caller))

    async def watch(
        self, name: str, *, after_revision: int = 0, caller: Caller = OPERATOR
    ) -> AsyncIterator[Job | TaskProgress]:
        """Progress, and the job's states after that revision, until it has ended; of several states that came at once
        only the newest. NotFound; ResourceExhausted where the tenant has too many; Unavailable when the gateway stops.
        """
        with self._quotas.place(caller, "streams", STREAMS), self._hub.subscribed(_id_of(name)) as subscription:
            news: Sequence[Job | TaskProgress] = [await self.get(name, caller)]
            while True:
                for each in news:
                    if isinstance(each, TaskProgress):
                        yield each
                        continue
                    if each.revision > after_revision:
                        after_revision = each.revision
                        yield self._leases.with_progress(each)
                    if each.state.ended:
                        return
                if self._draining:
                    raise Unavailable("the gateway is stopping; watch again", retry_after_s=1.0)
                news = await self._next_news(subscription, name, caller)

    async def _next_news(self, subscription: Subscription, name: str, caller: Caller) -> Sequence[Job | TaskProgress]:
        """What comes next; where nothing does, the job again: no watch hangs because a notification got lost."""
        try:
            async with asyncio.timeout(WATCH_REFRESH_S):
                await subscription.arrived.wait()
        except TimeoutError:
            return [await self.get(name, caller)]
        return subscription.take()

    async def wait(self, name: str, *, wait_s: float, caller: Caller = OPERATOR) -> Job:
        """The job once it has ended, or as it is when the wait is over or the gateway stops. NotFound.

        As it is also where the tenant has too many streams: whoever created a job must get its name.
        """
        try:
            with self._quotas.place(caller, "streams", STREAMS), self._hub.subscribed(_id_of(name)) as subscription:
                return await self._wait(subscription, name, wait_s, caller)
        except ResourceExhausted:
            return await self.get(name, caller)

    async def _wait(self, subscription: Subscription, name: str, wait_s: float, caller: Caller) -> Job:
        job = await self.get(name, caller)
        try:
            async with asyncio.timeout(wait_s):
                while not (job.state.ended or self._draining):
                    await subscription.arrived.wait()
                    job = next((each for each in subscription.take() if isinstance(each, Job)), job)
        except TimeoutError:
            return await self.get(name, caller)
        return job


def _id_of(name: str) -> str:
    prefix, _, job_id = name.partition("/")
    if prefix != "jobs" or not job_id:
        raise NotFound("must be jobs/{id}", field="name")
    return job_id
