"""The operator's moderation: tenants' policies, and a hook that is asked before a job exists and before a result shows.

A result waits as JUDGING in the job's record, so its worker is free and a gateway that is killed in between loses
nothing: whoever runs next asks again, under the same id, and the first verdict counts. Each tenant has places of its
own, so that a hook that hangs on one tenant's content holds up that tenant alone.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fanlight.errors import (
    ContentBlocked,
    FanlightError,
    ModerationUnavailable,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from services.gateway.app.core import Core
from services.gateway.app.leases import RandomBytes
from services.gateway.app.records import UnreadableRecord
from services.gateway.domain import machine
from services.gateway.domain.job import Failure, Job, StageRequest, Task, TaskState, task_name
from services.gateway.domain.moderation import ContentVerdict, Decision, Policy
from services.gateway.domain.plan import JobPlan
from services.gateway.ports import JudgedImage, ModerationHook, Question
from services.kernel.blobs import BlobInfo
from services.kernel.logs import get_logger

log = get_logger()

# A label of what passed without a verdict.
UNJUDGED = "unjudged"
TRIES = 3
PAUSE_S, PAUSE_FACTOR = 0.2, 3.0
# When another gateway, or this one after a failed write, asks about a result that nobody has settled.
TAKEOVER_S = 30.0
ROUND_S = 1.0
PLACE_RETRY_S = 2.0
ID_BYTES = 12

Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a stage's request has in it that can be judged; images as field, scope and digest."""

    prompt: str = ""
    negative_prompt: str = ""
    images: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModerationOptions:
    hook: ModerationHook
    content_of: Callable[[StageRequest], Content]
    timeout_s: float
    # What is not judged in time passes, with a label.
    fails_open: bool = False
    # Images are sent as bytes, as far as those of one question fit within the limit.
    sends_bytes: bool = False
    body_limit_bytes: int = 16 * 1024 * 1024
    # Questions of one tenant at a time, about requests and about results apart.
    places: int = 8


class Moderation:
    def __init__(self, core: Core, random_bytes: RandomBytes, *, is_shared: bool) -> None:
        self._job_store, self._blobs, self._quotas, self._clock = core.job_store, core.blobs, core.quotas, core.clock
        self._default = Policy(core.settings.moderation_policy)
        self._random_bytes, self._is_shared = random_bytes, is_shared
        self._options: ModerationOptions | None = None
        self._asking: Counter[str] = Counter()
        # Results without a verdict: the tenant, and from when on this gateway asks, on the monotonic clock.
        self._open: dict[Key, tuple[str, float]] = {}
        self._judging: dict[Key, str] = {}
        self._changed = asyncio.Event()
        core.job_store.observe(self._observe)

    def use(self, options: ModerationOptions) -> None:
        """Ask this hook from now on; before `run`."""
        self._options = options

    def policy_of(self, tenant: str) -> Policy:
        own = self._quotas.get(tenant).policy
        return self._default if own is None else own

    def pool_of(self, tenant: str) -> str:
        """Whose nodes' word on content counts; empty for any."""
        return self._quotas.get(tenant).policy_pool if self.policy_of(tenant) is not Policy.OFF else ""

    def is_asked(self, policy: Policy) -> bool:
        """Whether the hook judges jobs under that policy."""
        return self._options is not None and policy is not Policy.OFF

    # Requests.

    async def judge_request(self, plan: JobPlan, tenant: str, policy: Policy) -> ContentVerdict:
        """ContentBlocked for what may not be asked; ModerationUnavailable where nobody says so; ResourceExhausted."""
        options = self._options
        if options is None or policy is Policy.OFF:
            return ContentVerdict(decision=Decision.ALLOW)
        if self._asking[tenant] >= options.places:
            raise ResourceExhausted(
                f"moderation: {options.places} of your tenant's requests are being judged; try again later",
                retry_after_s=PLACE_RETRY_S,
            )
        self._asking[tenant] += 1
        try:
            question, blobs = self._of_request(plan, tenant, policy, options)
            verdict = await self._ask(question, blobs, options)
        finally:
            self._asking[tenant] -= 1
            if not self._asking[tenant]:
                del self._asking[tenant]
        if verdict is None:
            raise ModerationUnavailable("the operator's moderation does not answer", retry_after_s=PLACE_RETRY_S)
        if verdict.decision is Decision.BLOCK:
            log.info("request_blocked", id=question.id, tenant=tenant, labels=verdict.labels)
            raise ContentBlocked(_sentence("the operator's moderation refuses this request", verdict))
        return verdict

    def _of_request(
        self, plan: JobPlan, tenant: str, policy: Policy, options: ModerationOptions
    ) -> tuple[Question, Sequence[tuple[str, BlobInfo]]]:
        request = plan.requests[0]
        content = options.content_of(request)
        known = {(blob.scope, blob.digest): blob for blob in plan.blobs}
        blobs = [(field, known[scope, digest]) for field, scope, digest in content.images if (scope, digest) in known]
        question = Question(
            id=f"request_{self._random_bytes(ID_BYTES).hex()}",
            tenant=tenant,
            stage=request.stage,
            policy=policy.value,
            prompt=content.prompt,
            negative_prompt=content.negative_prompt,
        )
        return question, blobs

    # Results.

    def _observe(self, job: Job) -> None:
        if not job.is_judged:
            return
        for task in job.tasks:
            key = (job.id, task.number)
            if task.state is not TaskState.JUDGING:
                self._open.pop(key, None)
            elif key not in self._open:
                self._open[key] = (job.tenant, self._clock.monotonic_s() + self._delay_s())
                self._changed.set()

    def _delay_s(self) -> float:
        """The gateway that a worker called asks at once, by `hurry`; others leave it the time."""
        return TAKEOVER_S if self._is_shared else 0.0

    def hurry(self, job_id: str, number: int) -> None:
        """This gateway has stored the result itself: ask now."""
        if (job_id, number) in self._open:
            tenant, _ = self._open[job_id, number]
            self._open[job_id, number] = (tenant, self._clock.monotonic_s())
            self._changed.set()

    async def run(self) -> None:
        """Judge results as they come, until cancelled: what is in flight then is asked again later."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                for key in self._due():
                    self._judging[key] = self._open[key][0]
                    group.create_task(self._settle(key))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ROUND_S):
                        await self._changed.wait()

    def _due(self) -> Sequence[Key]:
        """As far as each tenant has places; its earliest jobs first."""
        now_s, busy = self._clock.monotonic_s(), Counter(self._judging.values())
        places = self._options.places if self._options else 1
        found = []
        for key, (tenant, due_s) in self._open.items():
            if due_s <= now_s and key not in self._judging and busy[tenant] < places:
                busy[tenant] += 1
                found.append(key)
        return found

    async def _settle(self, key: Key) -> None:
        try:
            job = await self._job_store.get(key[0])
            task = job.task(key[1])
            if task is not None and task.state is TaskState.JUDGING:
                await self._end(job, task, await self._verdict(job, task))
        except (NotFound, UnreadableRecord):
            self._open.pop(key, None)
        except FanlightError as error:
            log.warning("verdict_not_recorded", task=task_name(*key), reason=error.reason, message=error.message)
        finally:
            self._judging.pop(key, None)
            if key in self._open:
                self._open[key] = (self._open[key][0], self._clock.monotonic_s() + TAKEOVER_S)
            self._changed.set()

    async def _verdict(self, job: Job, task: Task) -> ContentVerdict | None:
        """None where nothing may pass without one, and there is none."""
        options = self._options
        if options is None:
            log.warning("moderation_unanswered", id=f"{job.id}.{task.number}", why="no hook is set any more")
            return None
        content = options.content_of(job.request)
        verdicts = [each.nsfw for each in task.outputs if each.nsfw is not None]
        question = Question(
            id=f"{job.id}.{task.number}",
            tenant=job.tenant,
            stage=task.stage,
            policy=job.policy or Policy.OFF.value,
            prompt=content.prompt,
            negative_prompt=content.negative_prompt,
            job=job.name,
            task=task.number,
            nsfw=any(verdicts) if verdicts else None,
        )
        blobs = [(f"outputs[{index}]", output.blob) for index, output in enumerate(task.outputs)]
        return await self._ask(question, blobs, options)

    async def _end(self, job: Job, task: Task, verdict: ContentVerdict | None) -> None:
        now_s, number = self._clock.now_s(), task.number
        if verdict is not None and not verdict.is_withheld:
            publish = partial(machine.publish, number=number, labels=verdict.labels, now_s=now_s)
            await self._job_store.change(job.id, publish)
            log.info("result_published", task=task_name(job.id, number), decision=verdict.decision.value)
            return
        if verdict is None:
            message = "the operator's moderation does not answer, and no result is shown without it"
            failure = Failure(reason=ModerationUnavailable.reason, message=message)
        else:
            failure = Failure(
                reason=ContentBlocked.reason,
                message=_sentence("the operator's moderation withholds the result", verdict),
            )
        withhold = partial(machine.withhold, number=number, failure=failure, now_s=now_s)
        await self._job_store.change(job.id, withhold)
        log.info("result_withheld", task=task_name(job.id, number), reason=failure.reason)

    # The hook.

    async def _ask(
        self, question: Question, blobs: Sequence[tuple[str, BlobInfo]], options: ModerationOptions
    ) -> ContentVerdict | None:
        """None where there is no answer, and nothing passes without one."""
        try:
            async with asyncio.timeout(options.timeout_s):
                images = await self._images(blobs, options)
                return await self._repeat(options.hook, replace(question, images=images))
        except TimeoutError:
            why = f"no answer within {options.timeout_s:g} s"
        except FanlightError as error:
            why = error.message
        log.warning("moderation_unanswered", id=question.id, tenant=question.tenant, why=why, open=options.fails_open)
        return ContentVerdict(decision=Decision.FLAG, labels=(UNJUDGED,)) if options.fails_open else None

    async def _repeat(self, hook: ModerationHook, question: Question) -> ContentVerdict:
        for attempt in range(TRIES - 1):
            try:
                return await hook.judge(question)
            except Unavailable:
                await asyncio.sleep(PAUSE_S * PAUSE_FACTOR**attempt)
        return await hook.judge(question)

    async def _images(
        self, blobs: Sequence[tuple[str, BlobInfo]], options: ModerationOptions
    ) -> tuple[JudgedImage, ...]:
        is_whole = sum(blob.size_bytes for _, blob in blobs) <= options.body_limit_bytes
        return tuple(
            [
                JudgedImage(
                    field=field,
                    blob=blob,
                    data=await self._read(blob) if options.sends_bytes and is_whole else b"",
                )
                for field, blob in blobs
            ]
        )

    async def _read(self, blob: BlobInfo) -> bytes:
        return b"".join([chunk async for chunk in self._blobs.read(blob.scope, blob.digest)])


def _sentence(what: str, verdict: ContentVerdict) -> str:
    return f"{what}: {verdict.reason}" if verdict.reason else what
