"""Checks of results: for a share of deterministic tasks a second node repeats the work, and a third one decides.

A check is a job of its own, which no client sees and which waits behind all others. Only nodes with the same build of
the annotator on the same kind of device are compared: their control images have equal bytes.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from fanlight.errors import FanlightError
from services.gateway.app.core import Core
from services.gateway.app.jobs import new_id
from services.gateway.domain.blame import main_need
from services.gateway.domain.job import Claim, Job, JobState, ResultCheck, Task, TaskState, task_name
from services.gateway.domain.offers import build_need
from services.kernel.logs import get_logger

log = get_logger()

# Behind every client's task.
PRIORITY = -100
# A check that no node did until then is dropped.
DEADLINE_S = 3_600.0
# How many checks may wait or run.
OPEN_LIMIT = 100
# How much the share's draw can tell apart.
DRAW_BYTES = 4
DRAWS = float(256**DRAW_BYTES)

# Whether two claims are of the same result.
Agree = Callable[[Claim, Claim], bool]
# Creates a check by one more node; False where no other node can do it.
AskAnother = Callable[[ResultCheck], Awaitable[bool]]
NoteChecked = Callable[[Claim, bool], Awaitable[None]]
# The claim that was false, what such tasks need, and why in a sentence.
LeaveOut = Callable[[Claim, Task, str, str], Awaitable[None]]


class TaskChecks(Protocol):
    """The checks of a stage's tasks."""

    async def consider(self, job: Job, number: int) -> None:
        """Have a completed task's result checked, now and then. Never fails the task."""
        ...

    async def settle(self, job: Job) -> None:
        """A task of a check is done; once all are, compare. The check is gone afterwards."""
        ...


class Judge:
    """What becomes of claims that agree, and of those that do not."""

    def __init__(self, *, note_checked: NoteChecked, leave_out: LeaveOut) -> None:
        """`note_checked`: counts a checked result, and whether it was false. `leave_out`: ends what a liar may do."""
        self._note_checked, self._leave_out = note_checked, leave_out

    async def judge(self, job: Job, check: ResultCheck, agree: Agree, ask: AskAnother) -> None:
        claims = check.claims
        digests = [each.digest for each in claims]
        nodes = [each.node for each in claims]
        false = [each for each in claims if not any(agree(each, other) for other in claims if other is not each)]
        if not false:
            await self._note_checked(claims[0], False)
        elif len(claims) == 2:
            log.warning("results_disagree", task=check.task, nodes=nodes, digests=digests)
            if not await ask(check):
                log.warning("disagreement_undecided", task=check.task, nodes=nodes, why="no third node can do it")
        elif len(false) == 1:
            await self._convict(job, check.task, false[0], claims)
        else:
            log.warning("disagreement_undecided", task=check.task, nodes=nodes, why="no two of three agree")

    async def _convict(self, job: Job, name: str, false: Claim, claims: Sequence[Claim]) -> None:
        others = " and ".join(each.node for each in claims if each is not false)
        log.warning("false_result", task=name, node=false.node, worker=false.worker, others=others)
        await self._note_checked(false, True)
        if false is not claims[0]:
            await self._note_checked(claims[0], False)
        why = f"its result of {name} is not the one that {others} have"
        await self._leave_out(false, job.tasks[0], main_need(job, job.tasks[0]), why)


class ResultChecks:
    """Of control images, whose bytes are compared."""

    def __init__(self, core: Core, judge: Judge) -> None:
        self._job_store = core.job_store
        self._workers = core.workers
        self._clock = core.clock
        self._random_bytes = core.random_bytes
        self._share = core.settings.checked_share
        self._judge = judge
        # Ids of open checks, of every gateway.
        self._open: set[str] = set()
        core.job_store.observe(self._observe)

    def _observe(self, job: Job) -> None:
        if job.check is not None and not job.state.ended:
            self._open.add(job.id)
        else:
            self._open.discard(job.id)

    async def consider(self, job: Job, number: int) -> None:
        """Have a completed task's result checked, now and then. Never fails the task."""
        task = job.tasks[number - 1]
        if not job.request_of(task).facts.annotator:
            return
        if task.lease is None or not self._share or len(self._open) >= OPEN_LIMIT or not self._is_drawn():
            return
        claim = Claim(node=task.lease.node, worker=task.lease.worker, digest=task.outputs[0].blob.digest)
        try:
            await self._ask(job, task, ResultCheck(task=task_name(job.id, number), claims=(claim,)))
        except FanlightError as error:
            log.info("check_not_made", task=task_name(job.id, number), reason=error.reason)

    def _is_drawn(self) -> bool:
        return int.from_bytes(self._random_bytes(DRAW_BYTES)) < self._share * DRAWS

    async def _ask(self, job: Job, task: Task, check: ResultCheck) -> bool:
        """Create the check, unless no other node can do it."""
        request = job.request_of(task)
        first, nodes = check.claims[0], frozenset(each.node for each in check.claims)
        announced = self._workers.offers.announced_annotator(first.worker, request.facts.annotator)
        is_repeatable = self._workers.offers.is_deterministic(first.worker, request.facts.annotator)
        if announced is None or not is_repeatable or any(each.task for each in task.inputs):
            return False
        need = build_need(announced)
        if not self._workers.offers.has_live(task.stage, request.facts.needs | {need}, but_not=nodes):
            return False
        now_s = self._clock.now_s()
        facts = replace(request.facts, needs=request.facts.needs | {need})
        repeated = Task(
            number=1,
            stage=task.stage,
            request=0,
            state=TaskState.QUEUED,
            patch=task.patch,
            inputs=task.inputs,
            queue_time_s=now_s,
            other_nodes=nodes,
        )
        made = Job(
            id=new_id(now_s, self._random_bytes),
            state=JobState.QUEUED,
            create_time_s=now_s,
            priority=PRIORITY,
            request_id="",
            requests=(replace(request, facts=facts),),
            tasks=(repeated,),
            blobs=job.blobs,
            tenant=job.tenant,
            deadline_s=now_s + DEADLINE_S,
            check=check,
        )
        await self._job_store.create(made)
        return True

    async def settle(self, job: Job) -> None:
        """Compare what a completed check has with the earlier claims; the check is gone afterwards."""
        task, check = job.tasks[0], job.check
        assert check is not None
        assert task.lease is not None
        own = Claim(node=task.lease.node, worker=task.lease.worker, digest=task.outputs[0].blob.digest)
        claims = (*check.claims, own)
        if len({each.node for each in claims}) == len(claims):
            whole = replace(check, claims=claims)
            await self._judge.judge(job, whole, _same_bytes, lambda asked: self._ask(job, task, asked))
        await self._job_store.forget(job.id)


def _same_bytes(one: Claim, other: Claim) -> bool:
    return one.digest == other.digest
