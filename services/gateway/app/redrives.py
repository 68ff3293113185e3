"""Dead letters tried anew."""

from fanlight.errors import FailedPrecondition, NotFound
from services.gateway.app.blob_retention import blobs_of
from services.gateway.app.callers import Caller
from services.gateway.app.core import Core
from services.gateway.app.dead_letters import DeadLetters
from services.gateway.jobs import machine
from services.gateway.jobs.model import Job
from services.kernel.logs import get_logger

log = get_logger()


class Redrives:
    def __init__(self, core: Core, letters: DeadLetters) -> None:
        self._ledger = core.ledger
        self._blobs = core.blobs
        self._clock = core.clock
        self._letters = letters

    async def redrive(self, task: str, caller: Caller) -> Job:
        """The job of that dead letter, waiting again with new attempts; the letter goes.

        NotFound: no such letter. FailedPrecondition: the job is gone or goes on already, or its pictures are gone.
        """
        letter = await self._letters.get(task, caller)
        job_id = letter.task.split("/")[1]
        try:
            job = await self._ledger.fresh(job_id)
        except NotFound as error:
            raise FailedPrecondition("its job is forgotten already", field="task") from error
        await self._require_pictures(job)
        now_s = self._clock.now_s()
        job = await self._ledger.change(job_id, lambda job: machine.redrive(job, now_s=now_s))
        await self._letters.forget(job)
        log.info("job_redriven", job=job.name, times=job.redrives)
        return job

    async def _require_pictures(self, job: Job) -> None:
        for blob in blobs_of(job):
            if await self._blobs.stat(blob.scope, blob.digest) is None:
                raise FailedPrecondition("a picture that it needs is forgotten already; make a new job", field="task")
