"""Long polls: workers request tasks, wait for them, and learn which models to prefetch.

Which tasks and models those are is for the scheduler to say.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fanlight.errors import LeaseLost, NotFound, Unavailable
from services.gateway.app.completion import Completion
from services.gateway.app.core import Core
from services.gateway.app.leases import new_token
from services.gateway.app.records import UnreadableRecord
from services.gateway.domain import machine
from services.gateway.domain.job import Failure, Fault, Job, Lease, Task, TaskState, task_name
from services.gateway.domain.workers import CHECKPOINT, Capabilities, Worker
from services.gateway.scheduler.queue import Key
from services.kernel.logs import get_logger

log = get_logger()

# A waiting poll asks the scheduler again this often: what is planned for another worker may be late there.
RECHECK_S = 5.0
# How often a poll chooses again, where other gateways were faster or the chosen tasks must wait.
CHOICES_LIMIT = 1_000

# UnreadableRecord where the task's message cannot be made of its record.
Check = Callable[[Job, Task], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    worker: Worker
    # Hexadecimal sha256 of the capabilities in force.
    capabilities_digest: str
    capabilities: Capabilities | None
    max_tasks: int
    held_tokens: frozenset[str]
    wait_s: float
    # Of the models that the worker holds; empty if unknown. Hexadecimal.
    holdings_digest: str = ""
    # `worker` is without them: they are those of its last poll with this digest.
    holdings_unchanged: bool = False
    # Hexadecimal sha256 of the secret of the worker's process; empty for one that sent none.
    secret_hash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineInput:
    """A small input image that travels with a lease."""

    scope: str
    digest: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedTask:
    job: Job
    task: Task
    token: str
    ttl_s: float
    inline_inputs: Sequence[InlineInput] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelToFetch:
    """A prefetch for the worker to do meanwhile."""

    model: str
    kind: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PollAnswer:
    tasks: Sequence[LeasedTask] = ()
    # All models to prefetch, the most urgent first; None where nothing changed.
    fetches: Sequence[ModelToFetch] | None = None
    wants_capabilities: bool = False
    # Of the holdings that are known of the worker; empty where it should send them.
    holdings_digest: str = ""


class Polls:
    def __init__(self, core: Core, completion: Completion) -> None:
        self._job_store = core.job_store
        self._leases = core.leases
        self._queue_index = core.queue_index
        self._scheduler = core.scheduler
        self._workers = core.workers
        self._notifier = core.notifier
        self._heartbeats = core.heartbeats
        self._clock = core.clock
        self._random_bytes = core.random_bytes
        self._completion = completion
        # Worker id to its newest poll; its worker has abandoned any older one that still waits.
        self._newest: dict[str, Poll] = {}
        self._draining = False

    def drain(self) -> None:
        self._draining = True
        self._notifier.notify_all()

    async def lease(self, poll: Poll, check: Check | None = None) -> PollAnswer:
        """Tasks for the worker, at once or as soon as there are some within its wait; perhaps no task. Unavailable.

        A task that does not pass `check` ends, with the error as its failure.
        """
        if self._draining:
            raise Unavailable("the gateway is stopping", retry_after_s=1.0)
        self._workers.require_process(poll.worker.id, poll.secret_hash)
        worker: Worker | None = poll.worker
        if poll.holdings_unchanged:
            worker = self._workers.with_holdings(poll.worker, poll.holdings_digest)
        if worker is None:
            return PollAnswer()
        if not await self._workers.seen(
            worker, poll.capabilities_digest, poll.capabilities, secret_hash=poll.secret_hash
        ):
            return PollAnswer(wants_capabilities=True)
        self._workers.note_holdings(worker.id, poll.holdings_digest)
        self._heartbeats.note_call(worker.id)
        await self._expire_unheld(worker.id, poll.held_tokens)
        if worker.draining or not poll.max_tasks:
            self._newest.pop(worker.id, None)
            self._queue_index.notify()
            return PollAnswer(fetches=self.new_fetches(worker.id), holdings_digest=poll.holdings_digest)
        self._newest[worker.id] = poll
        self._workers.begin_poll(worker.id)
        try:
            tasks = await self._wait(poll, check)
            fetches = self.new_fetches(worker.id)
            return PollAnswer(tasks=tasks, fetches=fetches, holdings_digest=poll.holdings_digest)
        finally:
            self._workers.end_poll(worker.id)
            self._heartbeats.note_call(worker.id)
            if self._newest.get(worker.id) is poll:
                del self._newest[worker.id]

    async def _expire_unheld(self, worker_id: str, held_tokens: frozenset[str]) -> None:
        for lease in self._leases.of_worker(worker_id):
            if lease.token not in held_tokens:
                await self._completion.expire(lease, unheld=True)

    async def _wait(self, poll: Poll, check: Check | None) -> Sequence[LeasedTask]:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + poll.wait_s
        while self._newest.get(poll.worker.id) is poll:
            tasks = await self._claim(poll, check)
            if tasks or self._has_new_fetches(poll.worker):
                return tasks
            left_s = until_s - loop.time()
            if left_s <= 0 or self._draining:
                break
            await self._notifier.wait(poll.worker.id, wait_s=min(left_s, RECHECK_S))
            self._workers.refresh(poll.worker.id)
        return ()

    async def _claim(self, poll: Poll, check: Check | None) -> Sequence[LeasedTask]:
        """Lease what the scheduler chooses; choose again where other gateways were faster."""
        for _ in range(CHOICES_LIMIT):
            planned = self._scheduler.choose(poll.worker.id, poll.max_tasks, self._clock.monotonic_s())
            self._queue_index.notify()
            if not planned:
                return ()
            if not (chosen := self._queue_index.without_waiting(planned)):
                continue
            keys = [task.key for task in chosen]
            self._queue_index.withhold(keys)
            try:
                leased = await self._lease(poll.worker, keys)
                if passed := [each for each in leased if check is None or await self._passes(each, check)]:
                    return passed
            finally:
                self._queue_index.release(keys)
        return ()

    async def _passes(self, leased: LeasedTask, check: Check) -> bool:
        try:
            check(leased.job, leased.task)
        except UnreadableRecord as error:
            failure = Failure(reason=error.reason, message=error.message)
            with contextlib.suppress(LeaseLost):
                await self._completion.fail(leased.token, Fault.REQUEST, failure, confirms=lambda *_: True)
            return False
        return True

    def _has_new_fetches(self, worker: Worker) -> bool:
        return worker.takes_fetches and self._scheduler.has_new_fetches(worker.id)

    def new_fetches(self, worker_id: str) -> Sequence[ModelToFetch] | None:
        """All models that the worker should prefetch, if that changed since it was last sent."""
        state = self._scheduler.worker(worker_id)
        if state is None or not state.view.takes_fetches or not self._scheduler.has_new_fetches(worker_id):
            return None
        return [
            ModelToFetch(
                model=fetch.model,
                kind=CHECKPOINT if fetch.sticky else self._workers.offers.model_kind(worker_id, fetch.model),
                size_bytes=fetch.size_bytes,
            )
            for fetch in self._scheduler.fetches(worker_id)
        ]

    async def _lease(self, worker: Worker, keys: Sequence[Key]) -> Sequence[LeasedTask]:
        leased: list[LeasedTask] = []
        now_s = self._clock.now_s()
        for job_id in dict.fromkeys(job_id for job_id, _ in keys):
            numbers = [number for each, number in keys if each == job_id]
            leased += await self._lease_of(job_id, numbers, worker, now_s=now_s, batch_size=len(keys))
        return leased

    async def _lease_of(
        self, job_id: str, numbers: Sequence[int], worker: Worker, *, now_s: float, batch_size: int
    ) -> Sequence[LeasedTask]:
        leases = {
            number: Lease(
                token=new_token((job_id, number), self._random_bytes),
                worker=worker.id,
                node=worker.node,
                time_s=now_s,
                batch_size=batch_size,
            )
            for number in numbers
        }

        def lease_queued(job: Job) -> Job:
            for number, lease in leases.items():
                if job.tasks[number - 1].state is TaskState.QUEUED:
                    job = machine.lease(job, number, lease, now_s=now_s)
            return job

        try:
            job = await self._job_store.change(job_id, lease_queued)
        except (NotFound, UnreadableRecord):
            return ()
        tasks = [task for task in job.tasks if task.lease and task.lease == leases.get(task.number)]
        for task in tasks:
            self._leases.renew(leases[task.number].token)
        for task in tasks:
            log.info("task_leased", task=task_name(job_id, task.number), worker=worker.id, attempt=task.leases)
        return [
            LeasedTask(job=job, task=task, token=leases[task.number].token, ttl_s=self._leases.ttl_s) for task in tasks
        ]
