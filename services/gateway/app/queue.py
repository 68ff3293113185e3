"""What workers ask for: tasks leased, renewed and ended."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fanlight.errors import FailedPrecondition, InvalidField, LeaseLost, NotFound, TooLarge
from services.gateway.app.blame import in_words_of_job
from services.gateway.app.cache import ControlImages
from services.gateway.app.callers import OPERATOR, Caller
from services.gateway.app.core import Core
from services.gateway.app.dead_letters import DeadLetters
from services.gateway.app.faults import blamed_need
from services.gateway.app.hub import Progress
from services.gateway.app.leases import HeldLease
from services.gateway.app.statistics import QueueLine, queue_lines
from services.gateway.app.tokens import key_of
from services.gateway.jobs import machine
from services.gateway.jobs.machine import Standing
from services.gateway.jobs.model import Failure, Fault, Job, Output, Span, task_name
from services.kernel.logs import get_logger

log = get_logger()

# What a sound node says that lacks what one request needs: another is tried, and the node goes on with all else.
NOT_HERE = frozenset({NotFound.reason, FailedPrecondition.reason, TooLarge.reason})


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    token: str
    # None where there is nothing new; its task is not looked at.
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    token: str
    # LIVE, CANCELLED or LOST.
    standing: Standing
    ttl_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One output that a worker says it has written."""

    scope: str
    digest: str
    width_px: int
    height_px: int
    seed: int | None = None
    nsfw: bool | None = None
    provenance: str = ""


class Queue:
    def __init__(self, core: Core, cache: ControlImages, dead_letters: DeadLetters) -> None:
        self._ledger = core.ledger
        self._leases = core.leases
        self._workers = core.workers
        self._faults = core.faults
        self._heartbeats = core.heartbeats
        self._deadlines = core.deadlines
        self._random_bytes = core.random_bytes
        self._hub = core.hub
        self._blobs = core.blobs
        self._clock = core.clock
        self._cache = cache
        self._dead_letters = dead_letters

    def statistics(self, caller: Caller = OPERATOR) -> Sequence[QueueLine]:
        """How much waits, by stage and checkpoint; of the jobs that the caller sees."""
        seen = (job for job in self._ledger.open_jobs if caller.sees(job))
        return queue_lines(seen, now_s=self._clock.now_s())

    async def renew(self, worker_id: str, renewals: Sequence[Renewal]) -> list[Renewed]:
        """Keep leases alive; one answer for each, in order."""
        self._workers.touch(worker_id)
        self._heartbeats.hear(worker_id)
        return [await self._renew(renewal) for renewal in renewals]

    async def _renew(self, renewal: Renewal) -> Renewed:
        held = self._leases.renew(renewal.token)
        if held is None:
            standing = await self._standing(renewal.token)
            held = self._leases.renew(renewal.token)
        if held is None:
            return Renewed(token=renewal.token, standing=standing)
        if renewal.progress is not None:
            self._take_progress(held, renewal.progress)
        return Renewed(token=renewal.token, standing=Standing.LIVE, ttl_s=self._leases.ttl_s)

    def _take_progress(self, held: HeldLease, said: Progress) -> None:
        job_id, number = held.key
        self._leases.move(held, said.step, said.steps)
        self._hub.tell(job_id, replace(said, task=number))

    async def _standing(self, token: str) -> Standing:
        """CANCELLED or LOST, after a look into the store: another gateway may have given the lease just now."""
        try:
            job_id, number = key_of(token)
            job = await self._ledger.fresh(job_id)
        except (LeaseLost, NotFound):
            return Standing.LOST
        found = machine.standing(job, number, token)
        return found if found is Standing.CANCELLED else Standing.LOST

    async def complete(self, token: str, made: Sequence[Made], spans: Sequence[Span]) -> None:
        """Take in a task's outputs. LeaseLost; FailedPrecondition when an output's blob is not there."""
        job_id, number = key_of(token)
        await self._require_standing(job_id, number, token)
        scope = (await self._job(job_id)).tenant
        outputs = [await self._output(i, each, scope) for i, each in enumerate(made)]
        now_s = self._clock.now_s()
        job = await self._ledger.change(
            job_id,
            lambda job: machine.complete(job, number, token, outputs=outputs, spans=spans, now_s=now_s),
        )
        log.info("task_completed", task=task_name(job_id, number), job_state=job.state.value)
        await self._remember(job, number)
        await self._note_success(job, number)

    async def _require_standing(self, job_id: str, number: int, token: str) -> None:
        """LeaseLost for a token that may not complete the task, by the store and not only by what is known of it."""
        ok = (Standing.LIVE, Standing.COMPLETED)
        if machine.standing(await self._job(job_id), number, token) in ok:
            return
        if machine.standing(await self._fresh(job_id), number, token) not in ok:
            raise LeaseLost("the token is no longer the task's; drop the work")

    async def _note_success(self, job: Job, number: int) -> None:
        lease = job.tasks[number - 1].lease
        if lease is not None:
            await self._faults.note_success(lease.node, blamed_need(job, number))

    async def _output(self, index: int, made: Made, scope: str) -> Output:
        if made.scope != scope:
            raise InvalidField(f"must be {scope}, as the task says", field=f"outputs[{index}].blob.scope")
        blob = await self._blobs.settle(made.scope, made.digest)
        if blob is None:
            raise FailedPrecondition(
                "there is no such blob; write it before completing the task", field=f"outputs[{index}].blob.digest"
            )
        return Output(
            blob=blob,
            width_px=made.width_px,
            height_px=made.height_px,
            seed=made.seed,
            nsfw=made.nsfw,
            provenance=made.provenance,
        )

    async def _remember(self, job: Job, number: int) -> None:
        """Where the same annotation may be asked for again."""
        task = job.tasks[number - 1]
        request = job.request_of(task)
        if task.lease is None or task.inputs or not request.facts.annotator:
            return
        annotator = self._workers.annotator_of(task.lease.worker, request.facts.annotator)
        if annotator is not None:
            await self._cache.keep(request, annotator, task.outputs[0])

    async def end_attempt(self, token: str, fault: Fault | None, failure: Failure) -> None:
        """Give a task up; without a fault it only goes back. LeaseLost."""
        if fault is None:
            await self.give_back(token)
        else:
            await self.fail(token, fault, failure)

    async def fail(self, token: str, fault: Fault, failure: Failure) -> None:
        """LeaseLost."""
        job_id, number = key_of(token)
        failure = in_words_of_job(failure, await self._job(job_id), number)
        now_s = self._clock.now_s()
        chance = self._chance()
        job = await self._ledger.change(
            job_id,
            lambda job: machine.fail(job, number, token, fault=fault, failure=failure, now_s=now_s, chance=chance),
        )
        log.info(
            "task_failed",
            task=task_name(job_id, number),
            fault=fault.value,
            reason=failure.reason,
            job_state=job.state.value,
        )
        await self._dead_letters.keep(job)
        if fault is Fault.NODE and failure.reason not in NOT_HERE:
            await self._faults.note_failure(job.tasks[number - 1].attempts[-1].node, blamed_need(job, number))

    def _chance(self) -> float:
        """From 0 up to 1."""
        return self._random_bytes(1)[0] / 256

    async def give_back(self, token: str) -> None:
        """LeaseLost."""
        job_id, number = key_of(token)
        await self._job(job_id)
        now_s = self._clock.now_s()
        await self._ledger.change(job_id, lambda job: machine.give_back(job, number, token, now_s=now_s))
        log.info("task_returned", task=task_name(job_id, number))

    async def expire(self, held: HeldLease, *, unheld: bool = False) -> None:
        """End a lease about which its worker says nothing any more, or of which it does not know."""
        job_id, number = held.key
        now_s, chance = self._clock.now_s(), self._chance()
        try:
            job = await self._ledger.change(
                job_id, lambda job: machine.expire(job, number, held.token, now_s=now_s, unheld=unheld, chance=chance)
            )
        except NotFound:
            return
        log.info("lease_expired", task=task_name(job_id, number), worker=held.worker, unheld=unheld)
        await self._dead_letters.keep(job)

    async def expire_due(self) -> None:
        for held in self._leases.due():
            await self.expire(held)

    async def end_late_jobs(self) -> None:
        """Those whose deadline has passed."""
        now_s = self._clock.now_s()
        for job_id in self._deadlines.passed():
            with contextlib.suppress(NotFound):
                await self._ledger.change(job_id, lambda job: machine.miss_deadline(job, now_s=now_s))
                log.info("deadline_missed", job=f"jobs/{job_id}")

    async def _fresh(self, job_id: str) -> Job:
        try:
            return await self._ledger.fresh(job_id)
        except NotFound as error:
            raise LeaseLost("the job is gone; drop the work") from error

    async def _job(self, job_id: str) -> Job:
        try:
            return await self._ledger.get(job_id)
        except NotFound as error:
            raise LeaseLost("the job is gone; drop the work") from error
