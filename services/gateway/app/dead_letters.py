"""Dead letters: tasks whose attempts are spent, with the node and reason of each attempt; and their redrive."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fanlight.errors import AlreadyExists, FailedPrecondition, InvalidField, NotFound
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.core import Core
from services.gateway.app.records import Codec, Records
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.domain import machine
from services.gateway.domain.job import DEFAULT_TENANT, Attempt, Failure, Job, Task, blobs_of, task_name
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "dead_letters"
# How many are kept; the oldest go first.
LETTERS_LIMIT = 10_000
_TASK = re.compile(r"jobs/[a-z0-9]{1,64}/tasks/[0-9]{1,9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    # `jobs/{id}/tasks/{number}`.
    task: str
    stage: str
    time_s: float
    failure: Failure
    attempts: tuple[Attempt, ...]
    tenant: str = DEFAULT_TENANT


LETTERS: Codec[DeadLetter] = Codec(DeadLetter)


class DeadLetters:
    def __init__(self, store: Records, audit: AuditLog) -> None:
        self._store, self._audit = store, audit

    async def keep(self, job: Job) -> None:
        """Write a letter for every dead task of the job; existing letters stay."""
        for task in job.tasks:
            if task.dead:
                await self._keep(job, task)

    async def _keep(self, job: Job, task: Task) -> None:
        assert task.failure is not None
        name = task_name(job.id, task.number)
        letter = DeadLetter(
            task=name,
            stage=task.stage,
            time_s=task.end_time_s,
            failure=task.failure,
            attempts=task.attempts,
            tenant=job.tenant,
        )
        try:
            await self._store.create(BUCKET, _key(name), LETTERS.encode(letter))
        except AlreadyExists:
            return

    async def page(self, *, before: str = "", limit: int, caller: Caller = OPERATOR) -> Sequence[DeadLetter]:
        """Those of the newest jobs first; `before`: the task of the previous page's last letter.

        Shorter than `limit` only at the end of the list.
        """
        if before and not _TASK.fullmatch(before):
            raise InvalidField("is not a token that a page returned", field="page_token")
        found: list[DeadLetter] = []
        key = _key(before) if before else ""
        while len(found) < limit and (records := await self._store.list(BUCKET, before=key, limit=limit)):
            letters = [self._store.read(LETTERS, BUCKET, record) for record in records]
            found += [
                letter
                for letter in letters
                if letter is not None and (caller.is_operator or letter.tenant == caller.tenant)
            ]
            key = records[-1].key
        others = {letter.tenant for letter in found[:limit]} - {caller.tenant}
        if others:
            tenant = others.pop() if len(others) == 1 else "*"
            await self._audit.note_read("dead_letters.list", f"tenants/{tenant}/dead-letters", tenant=tenant)
        return found[:limit]

    async def get(self, task: str, caller: Caller = OPERATOR) -> DeadLetter:
        """By the task's name. NotFound, also for another tenant's letter."""
        record = await self._store.get(BUCKET, _key(task))
        letter = self._store.read(LETTERS, BUCKET, record) if record else None
        if letter is None or not (caller.is_operator or letter.tenant == caller.tenant):
            raise NotFound("there is no such dead letter", field="task")
        await self._audit.note_read("dead_letters.read", f"dead-letters/{task}", tenant=letter.tenant)
        return letter

    async def forget(self, job: Job) -> None:
        """Delete all letters of the job."""
        for task in job.tasks:
            await self._store.delete(BUCKET, _key(task_name(job.id, task.number)))

    async def sweep(self) -> None:
        """Delete the oldest above the limit."""
        newest = await self._store.list(BUCKET, limit=LETTERS_LIMIT)
        if len(newest) == LETTERS_LIMIT:
            for record in await self._store.list(BUCKET, before=newest[-1].key, limit=LETTERS_LIMIT):
                await self._store.delete(BUCKET, record.key)


def _key(task: str) -> str:
    return task.removeprefix("jobs/").replace("/tasks/", ".")


class Redrives:
    def __init__(self, core: Core, letters: DeadLetters) -> None:
        self._job_store = core.job_store
        self._blobs = core.blobs
        self._clock = core.clock
        self._letters = letters
        self._audit = core.audit

    async def redrive(self, task: str, caller: Caller) -> Job:
        """Retry the job of that dead letter with new attempts, and delete the letter.

        NotFound: no such letter. FailedPrecondition: the job is deleted or runs already, or its images are deleted.
        """
        async with self._audit.change("dead_letters.redrive", f"dead-letters/{task}", caller=caller) as change:
            letter = await self._letters.get(task, caller)
            change.tenant = letter.tenant
            return await self._redrive(letter)

    async def _redrive(self, letter: DeadLetter) -> Job:
        job_id = letter.task.split("/")[1]
        try:
            job = await self._job_store.fresh(job_id)
        except NotFound as error:
            raise FailedPrecondition("its job is deleted already", field="task") from error
        await self._require_images(job)
        now_s = self._clock.now_s()
        job = await self._job_store.change(job_id, lambda job: machine.redrive(job, now_s=now_s))
        await self._letters.forget(job)
        log.info("job_redriven", job=job.name, times=job.redrives)
        return job

    async def _require_images(self, job: Job) -> None:
        for blob in blobs_of(job):
            if await self._blobs.stat(blob.scope, blob.digest) is None:
                raise FailedPrecondition("an image that it needs is deleted already; create a new job", field="task")
