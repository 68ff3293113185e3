"""The tasks whose attempts are spent, with every attempt's node and reason, for a person to look at."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fanlight.errors import AlreadyExists, InvalidField, NotFound
from services.gateway.app.callers import OPERATOR, Caller
from services.gateway.app.records import Codec
from services.gateway.jobs.model import DEFAULT_TENANT, Attempt, Failure, Job, Task, task_name
from services.gateway.ports import JobStore

BUCKET = "dead_letters"
# How many are kept, the newest ones.
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
    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def keep(self, job: Job) -> None:
        """Keep a letter for every dead task of the job; those that are kept already stay."""
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
        """Those of the newest jobs first; `before`: the task of the last letter of the page before.

        Shorter than `limit` only at the end of the list.
        """
        if before and not _TASK.fullmatch(before):
            raise InvalidField("is no token that a page gave", field="page_token")
        found: list[DeadLetter] = []
        key = _key(before) if before else ""
        while len(found) < limit and (records := await self._store.list(BUCKET, before=key, limit=limit)):
            letters = [LETTERS.read(BUCKET, record) for record in records]
            found += [
                letter
                for letter in letters
                if letter is not None and (caller.is_operator or letter.tenant == caller.tenant)
            ]
            key = records[-1].key
        return found[:limit]

    async def get(self, task: str, caller: Caller = OPERATOR) -> DeadLetter:
        """By the task's name. NotFound, also for another tenant's."""
        record = await self._store.get(BUCKET, _key(task))
        letter = LETTERS.read(BUCKET, record) if record else None
        if letter is None or not (caller.is_operator or letter.tenant == caller.tenant):
            raise NotFound("there is no such dead letter", field="task")
        return letter

    async def forget(self, job: Job) -> None:
        """All letters of the job."""
        for task in job.tasks:
            await self._store.delete(BUCKET, _key(task_name(job.id, task.number)))

    async def sweep(self) -> None:
        """Forget what is above the limit."""
        newest = await self._store.list(BUCKET, limit=LETTERS_LIMIT)
        if len(newest) == LETTERS_LIMIT:
            for record in await self._store.list(BUCKET, before=newest[-1].key, limit=LETTERS_LIMIT):
                await self._store.delete(BUCKET, record.key)


def _key(task: str) -> str:
    return task.removeprefix("jobs/").replace("/tasks/", ".")
