"""What becomes of leased tasks: renewed, completed, failed, given back, or expired.

Which change a token may make is for `domain.machine` to say; what is leased to whom, for the scheduler.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fanlight.contract.needs import SAFETY_CHECKER
from fanlight.errors import FailedPrecondition, InvalidField, LeaseLost, NotFound, ResultRefused
from services.gateway.app.control_cache import ControlImageCache
from services.gateway.app.core import Core
from services.gateway.app.dead_letters import DeadLetters
from services.gateway.app.leases import LiveLease, MeasuredSpeed, task_key_of
from services.gateway.app.queue_index import QueueLine, kind_of, queue_lines
from services.gateway.app.records import UnreadableRecord
from services.gateway.app.result_checks import TaskChecks
from services.gateway.app.results import ClaimedSize, ResultChecker
from services.gateway.app.second_opinions import OPINION_WAIT_S
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.app.watch import TaskProgress
from services.gateway.domain import blame, machine
from services.gateway.domain.circuit_breaker import FAILURES_ALLOWED
from services.gateway.domain.job import Failure, Fault, Job, Output, Span, Task, TaskState, task_name
from services.gateway.domain.machine import LeaseStatus
from services.gateway.domain.moderation import Policy
from services.kernel.logs import get_logger

log = get_logger()

# The field of a request for one image, such as AnnotateRequest's.
IMAGE = "image"
# The reason of a circuit breaker for a node whose claim that a request is at fault was wrong.
DISPROVED = "REQUEST_FAULT_DISPROVED"

_HIDING = frozenset(f"{SAFETY_CHECKER}:{each}" for each in (Policy.BLUR, Policy.BLOCK))

# Whether the gateway's own check of the task's request finds the same fault; the failure names the task's field.
Confirms = Callable[[Job, Task, Failure], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    token: str
    # None where there is nothing new; its `task` is ignored.
    progress: TaskProgress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalResult:
    token: str
    # LIVE, CANCELLED or LOST.
    status: LeaseStatus
    ttl_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedOutput:
    """One output that a worker reports to have written."""

    scope: str
    digest: str
    width_px: int
    height_px: int
    seed: int | None = None
    nsfw: bool | None = None
    provenance: str = ""
    warnings: tuple[str, ...] = ()


class Completion:
    """Ends and renews leases, by their tokens."""

    def __init__(
        self,
        core: Core,
        cache: ControlImageCache,
        dead_letters: DeadLetters,
        checks: Mapping[str, TaskChecks],
        judge: Callable[[str, int], None] = lambda job_id, number: None,
    ) -> None:
        """`checks`: of the results of each stage that has some. `judge`: is told of results that wait for a verdict."""
        self._job_store = core.job_store
        self._leases = core.leases
        self._workers = core.workers
        self._breakers = core.circuit_breakers
        self._heartbeats = core.heartbeats
        self._deadlines = core.deadlines
        self._opinions = core.opinions
        self._scheduler = core.scheduler
        self._random_bytes = core.random_bytes
        self._hub = core.hub
        self._blobs = core.blobs
        self._clock = core.clock
        self._cache = cache
        self._dead_letters = dead_letters
        self._results = ResultChecker(core.blobs)
        self._checks = checks
        self._judge = judge

    def statistics(self, caller: Caller = OPERATOR) -> Sequence[QueueLine]:
        """How much waits, by stage and checkpoint; only of jobs that the caller may see."""
        seen = (job for job in self._job_store.open_jobs if caller.counts(job))
        return queue_lines(seen, now_s=self._clock.now_s())

    async def renew(self, worker_id: str, renewals: Sequence[Renewal]) -> list[RenewalResult]:
        """Keep leases alive; one answer for each, in order."""
        self._workers.touch(worker_id)
        self._heartbeats.note_call(worker_id)
        return [await self._renew(renewal) for renewal in renewals]

    async def _renew(self, renewal: Renewal) -> RenewalResult:
        lease = self._leases.renew(renewal.token)
        if lease is None:
            status = await self._status(renewal.token)
            lease = self._leases.renew(renewal.token)
        if lease is None:
            return RenewalResult(token=renewal.token, status=status)
        if renewal.progress is not None:
            self._take_progress(lease, renewal.progress)
        return RenewalResult(token=renewal.token, status=LeaseStatus.LIVE, ttl_s=self._leases.ttl_s)

    def _take_progress(self, lease: LiveLease, reported: TaskProgress) -> None:
        job_id, number = lease.key
        job = self._job_store.open_job(job_id)
        if job is None or hides_previews(job):
            reported = replace(reported, preview=b"")
        self._leases.note_progress(lease, reported)
        self._hub.publish(job_id, replace(reported, task=number))

    async def _status(self, token: str) -> LeaseStatus:
        """CANCELLED or LOST, after a read from the store: another gateway may have given the lease just now."""
        try:
            job_id, number = task_key_of(token)
            job = await self._job_store.fresh(job_id)
        except (LeaseLost, NotFound, UnreadableRecord):
            return LeaseStatus.LOST
        found = machine.lease_status(job, number, token)
        return found if found is LeaseStatus.CANCELLED else LeaseStatus.LOST

    async def complete(self, token: str, reported: Sequence[ReportedOutput], spans: Sequence[Span]) -> None:
        """Complete a task with its outputs. LeaseLost; FailedPrecondition when an output's blob does not exist.

        ResultRefused for what cannot be a result of the task: that attempt has then failed by its node's fault.
        """
        job_id, number = task_key_of(token)
        is_again = await self._require_lease(job_id, number, token) is LeaseStatus.COMPLETED
        scope = (await self._job(job_id)).tenant
        outputs = [await self._output(i, each, scope) for i, each in enumerate(reported)]
        if not is_again:
            await self._check_results(token, outputs)
        now_s = self._clock.now_s()
        job = await self._job_store.change(
            job_id,
            lambda job: machine.complete(job, number, token, outputs=outputs, spans=spans, now_s=now_s),
        )
        log.info("task_completed", task=task_name(job_id, number), job_state=job.state.value)
        self._judge(job_id, number)
        if job.check is None:
            await self._cache_output(job, number)
        if not is_again:
            await self._note_success(job, number)
            await self._check_later(job, number)

    async def _check_later(self, job: Job, number: int) -> None:
        checked = job.tasks[0] if job.check is not None else job.tasks[number - 1]
        checks = self._checks.get(checked.stage)
        if checks is not None and job.check is not None:
            await checks.settle(job)
        elif checks is not None:
            await checks.consider(job, number)

    async def _check_results(self, token: str, outputs: Sequence[Output]) -> None:
        job_id, number = task_key_of(token)
        job = await self._job(job_id)
        task = job.tasks[number - 1]
        try:
            for i, each in enumerate(outputs):
                size = ClaimedSize(width_px=each.width_px, height_px=each.height_px)
                await self._results.check(task.stage, job.request_of(task).facts, i, each.blob, size)
        except ResultRefused as refused:
            await self._refuse(token, refused)
            raise

    async def _refuse(self, token: str, refused: ResultRefused) -> None:
        """End the attempt as the node's failure; the node is left out at once for what the task mainly needed."""
        job_id, number = task_key_of(token)
        failure = Failure(reason=refused.reason, message=f"the result's {refused.field} {refused.message}")
        now_s, chance = self._clock.now_s(), self._chance()
        job = await self._job_store.change(
            job_id,
            lambda job: machine.fail(job, number, token, fault=Fault.NODE, failure=failure, now_s=now_s, chance=chance),
        )
        task = job.tasks[number - 1]
        attempt = task.attempts[-1]
        log.warning("result_refused", task=task_name(job_id, number), worker=attempt.worker, why=failure.message)
        await self._keep_letter(job)
        key = self._workers.key_of(attempt.worker, task.stage, blame.main_need(job, task))
        await self._breakers.note_failure(
            attempt.node, key, refused.reason, lease_s=attempt.lease_time_s, weight=FAILURES_ALLOWED
        )

    async def _require_lease(self, job_id: str, number: int, token: str) -> LeaseStatus:
        """LIVE or COMPLETED. LeaseLost for a token that may not complete the task, also after a fresh read."""
        ok = (LeaseStatus.LIVE, LeaseStatus.COMPLETED)
        status = machine.lease_status(await self._job(job_id), number, token)
        if status not in ok:
            status = machine.lease_status(await self._fresh(job_id), number, token)
        if status not in ok:
            raise LeaseLost("the token is no longer the task's; drop the work")
        return status

    async def _note_success(self, job: Job, number: int) -> None:
        """For all that the task needed there; against nodes that said that the request is at fault."""
        task = job.tasks[number - 1]
        if task.lease is None:
            return
        needs = {*job.request_of(task).facts.parts, blame.stage_need(task.stage)}
        keys = [self._workers.key_of(task.lease.worker, task.stage, need) for need in needs]
        await self._breakers.note_success(task.lease.node, keys)
        for claim, need in blame.disproved(job, number):
            log.warning("request_fault_disproved", task=task_name(job.id, number), node=claim.node)
            key = self._workers.key_of(claim.worker, task.stage, need)
            await self._breakers.note_failure(claim.node, key, DISPROVED, lease_s=claim.lease_time_s)

    async def _output(self, index: int, reported: ReportedOutput, scope: str) -> Output:
        if reported.scope != scope:
            raise InvalidField(f"must be {scope}, as the task says", field=f"outputs[{index}].blob.scope")
        blob = await self._blobs.settle(reported.scope, reported.digest)
        if blob is None:
            raise FailedPrecondition(
                "there is no such blob; write it before completing the task", field=f"outputs[{index}].blob.digest"
            )
        return Output(
            blob=blob,
            width_px=reported.width_px,
            height_px=reported.height_px,
            seed=reported.seed,
            nsfw=reported.nsfw,
            provenance=reported.provenance,
            warnings=reported.warnings,
        )

    async def _cache_output(self, job: Job, number: int) -> None:
        """Cache a control image, where the same annotation may be requested again; not one that waits for a verdict."""
        task = job.tasks[number - 1]
        request = job.request_of(task)
        if task.state is not TaskState.SUCCEEDED or task.lease is None or task.inputs or not request.facts.annotator:
            return
        annotator = self._workers.offers.annotator_of(task.lease.worker, request.facts.annotator)
        if annotator is not None:
            # The message names its image by digest, in clear text.
            sources = [blob.digest for blob in job.blobs if blob.digest.encode() in request.message]
            await self._cache.keep(request, annotator, task.outputs[0], node=task.lease.node, sources=sources)

    async def end_attempt(
        self, token: str, fault: Fault | None, failure: Failure, confirms: Confirms | None = None
    ) -> None:
        """End a worker's attempt; without a fault the task is only given back. LeaseLost."""
        if fault is None:
            await self.give_back(token)
        else:
            await self.fail(token, fault, failure, confirms)

    async def fail(self, token: str, fault: Fault, failure: Failure, confirms: Confirms | None = None) -> None:
        """A fault of the request ends the task only where this gateway or another node confirms it. LeaseLost."""
        job_id, number = task_key_of(token)
        job = await self._job(job_id)
        failure = self._believed(failure, job, number)
        is_confirmed = fault is Fault.REQUEST and self._is_confirmed(job, number, failure, confirms)
        is_beside_others = self._is_beside_others(job.tasks[number - 1])
        failure = as_clients_field(failure, job, number)
        now_s = self._clock.now_s()
        chance = self._chance()
        job = await self._job_store.change(
            job_id,
            lambda job: machine.fail(
                job,
                number,
                token,
                fault=fault,
                failure=failure,
                now_s=now_s,
                chance=chance,
                confirmed=is_confirmed,
                is_beside_others=is_beside_others,
            ),
        )
        log.info(
            "task_failed",
            task=task_name(job_id, number),
            fault=fault.value,
            reason=failure.reason,
            part=failure.part,
            job_state=job.state.value,
        )
        await self._keep_letter(job)
        if fault is Fault.NODE:
            await self._note_failure(job, number)

    def _believed(self, failure: Failure, job: Job, number: int) -> Failure:
        """Without a part that the task does not use."""
        task = job.tasks[number - 1]
        facts = job.request_of(task).facts
        is_fetched = task.lease is not None and self._workers.offers.fetches_for(task.lease.worker, facts)
        return blame.believed(failure, facts, is_fetched=is_fetched)

    def _is_confirmed(self, job: Job, number: int, failure: Failure, confirms: Confirms | None) -> bool:
        """Whether no other node need be asked: this gateway says the same, or no other node could do it soon."""
        task = job.tasks[number - 1]
        if confirms is not None and confirms(job, task, failure):
            return True
        nodes = task.failed_nodes | {task.lease.node if task.lease is not None else ""}
        return not self._scheduler.can_another(kind_of(job, task), nodes, within_s=OPINION_WAIT_S)

    def _is_beside_others(self, task: Task) -> bool:
        """Whether its worker has other tasks too."""
        lease = task.lease
        if lease is None:
            return False
        return lease.batch_size > 1 or any(each.token != lease.token for each in self._leases.of_worker(lease.worker))

    async def _note_failure(self, job: Job, number: int) -> None:
        task = job.tasks[number - 1]
        attempt = task.attempts[-1]
        assert attempt.failure is not None
        need = blame.blamed_need(job, task, attempt.failure)
        if need and blame.is_first(job, attempt, need):
            key = self._workers.key_of(attempt.worker, task.stage, need)
            await self._breakers.note_failure(attempt.node, key, attempt.failure.reason, lease_s=attempt.lease_time_s)

    def _chance(self) -> float:
        """From 0 up to 1."""
        return self._random_bytes(1)[0] / 256

    async def give_back(self, token: str) -> None:
        """LeaseLost."""
        job_id, number = task_key_of(token)
        await self._job(job_id)
        now_s = self._clock.now_s()
        await self._job_store.change(job_id, lambda job: machine.give_back(job, number, token, now_s=now_s))
        log.info("task_returned", task=task_name(job_id, number))

    async def expire(self, live: LiveLease, *, unheld: bool = False, stalled: Failure | None = None) -> None:
        """End a lease that its worker no longer renews, does not know of, or has stalled; the task is retried."""
        job_id, number = live.key
        now_s, chance = self._clock.now_s(), self._chance()

        def expire(job: Job) -> Job:
            return machine.expire(job, number, live.token, now_s=now_s, unheld=unheld, chance=chance, failure=stalled)

        try:
            job = await self._job_store.change(job_id, expire)
        except (NotFound, UnreadableRecord):
            return
        why = {"stalled": stalled.message} if stalled else {}
        log.info("lease_expired", task=task_name(job_id, number), worker=live.worker, unheld=unheld, **why)
        await self._keep_letter(job)

    async def expire_due(self) -> None:
        """End the leases that were not renewed in time, and those whose tasks come no further."""
        for live in self._leases.due():
            await self.expire(live)
        for live, idle_s in self._leases.stalled(self._speed_of):
            await self.expire(live, stalled=_stalled(live, idle_s))

    def _speed_of(self, live: LiveLease) -> MeasuredSpeed:
        return self._workers.measured_speed(live.worker, live.family, live.size_class)

    async def end_late_jobs(self) -> None:
        """Fail the jobs whose deadline has passed."""
        now_s = self._clock.now_s()
        for job_id in self._deadlines.passed():
            with contextlib.suppress(NotFound, UnreadableRecord):
                await self._job_store.change(job_id, lambda job: machine.miss_deadline(job, now_s=now_s))
                log.info("deadline_missed", job=f"jobs/{job_id}")

    async def end_unconfirmed(self) -> None:
        """End the tasks for which no other node said in time whether the request is at fault."""
        now_s = self._clock.now_s()
        for job_id, number in self._opinions.overdue():
            with contextlib.suppress(NotFound, UnreadableRecord):
                await self._job_store.change(job_id, partial(machine.uphold, number=number, now_s=now_s))
                log.info("second_opinion_missing", task=task_name(job_id, number))

    async def _keep_letter(self, job: Job) -> None:
        """Of what a client requested."""
        if job.check is None:
            await self._dead_letters.keep(job)

    async def _fresh(self, job_id: str) -> Job:
        try:
            return await self._job_store.fresh(job_id)
        except NotFound as error:
            raise LeaseLost("the job is gone; drop the work") from error

    async def _job(self, job_id: str) -> Job:
        try:
            return await self._job_store.get(job_id)
        except NotFound as error:
            raise LeaseLost("the job is gone; drop the work") from error


def hides_previews(job: Job) -> bool:
    """Whether its previews would show what may be withheld, blurred or blocked later."""
    return job.is_judged or any(not _HIDING.isdisjoint(each.facts.needs) for each in job.requests)


def _stalled(live: LiveLease, idle_s: float) -> Failure:
    progress = live.progress
    where = f"at step {progress.reached} of {progress.steps}" if progress.reached else "before its first step"
    message = f"{live.worker} reported no progress for {idle_s:.0f} s, {where}"
    return Failure(reason="STALLED", message=message)


def as_clients_field(failure: Failure, job: Job, number: int) -> Failure:
    """The failure of that task, with its field named as in the client's request: workers name fields of their task."""
    if not failure.field:
        return failure
    return replace(failure, field=_clients_field(failure.field, job, job.tasks[number - 1]))


def _clients_field(field: str, job: Job, task: Task) -> str:
    """For a task that the client did not request itself: the field that takes its output."""
    asked = job.request.field
    taken_at = next((each.field for other in job.tasks for each in other.inputs if each.task == task.number), "")
    if task.stage == job.request.stage or not taken_at:
        return f"{asked}.{field}"
    first, dot, rest = field.partition(".")
    if first == IMAGE:
        return f"{asked}.{taken_at}{dot}{rest}"
    parent, is_below, _ = taken_at.rpartition(".")
    return f"{asked}.{parent}.{field}" if is_below else f"{asked}.{field}"
