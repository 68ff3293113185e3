"""Deletes jobs and blobs for good, with what was derived from them. Tenants: see tenant_deletion."""

from collections.abc import Sequence
from dataclasses import dataclass

from fanlight.errors import FailedPrecondition, NotFound
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.control_cache import ControlImageCache
from services.gateway.app.core import Core
from services.gateway.app.dead_letters import DeadLetters
from services.gateway.app.job_store import IdempotencyKeys
from services.gateway.app.jobs import Jobs
from services.gateway.app.tenants import Caller
from services.gateway.domain.job import Job, blobs_of
from services.kernel.blobs import BlobInfo
from services.kernel.logs import get_logger

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedJob:
    name: str
    # How many of its results were deleted, and how many stay because another job uses them.
    blobs: int
    shared_blobs: int


class Deletions:
    def __init__(
        self,
        core: Core,
        jobs: Jobs,
        requests: IdempotencyKeys,
        cache: ControlImageCache,
        letters: DeadLetters,
        audit: AuditLog,
    ) -> None:
        self._jobs, self._requests, self._cache, self._letters, self._audit = jobs, requests, cache, letters, audit
        self._job_store, self._webhooks, self._blobs = core.job_store, core.webhooks, core.blobs
        self._references = core.references

    async def delete_job(self, name: str, caller: Caller) -> DeletedJob:
        """A running job is cancelled first. NotFound, also for another tenant's job."""
        async with self._audit.change("jobs.delete", name, steps=True, caller=caller) as change:
            job = await self._jobs.ended(name, caller)
            change.tenant = job.tenant
            checks = [await self._found(job_id) for job_id in self._references.checks_of(job.id)]
            deleted = 0
            results = _results(job)
            for each in (*filter(None, checks), job):
                await self.forget(each)
            kept = [blob for blob in results if self._references.count_of(blob.scope, blob.digest)]
            for blob in results:
                if blob not in kept:
                    await self._delete_blob(blob.scope, blob.digest)
                    deleted += 1
            change.detail = f"{deleted} blobs deleted, {len(kept)} in use by other jobs"
        log.info("job_deleted", job=job.name, blobs=deleted, by=caller.name)
        return DeletedJob(name=job.name, blobs=deleted, shared_blobs=len(kept))

    async def _found(self, job_id: str) -> Job | None:
        try:
            return await self._job_store.get(job_id)
        except NotFound:
            return None

    async def forget(self, job: Job) -> None:
        """Its record last: whoever goes on after a crash finds by it what is left."""
        await self._requests.forget(job.request_id, job.tenant)
        await self._webhooks.forget(job)
        await self._letters.forget(job)
        await self._job_store.forget(job.id)

    async def delete_blob(self, scope: str, digest: str, caller: Caller) -> int:
        """And the cached control images made of it; how many blobs. NotFound; FailedPrecondition names an open job."""
        target = f"blobs/{scope}/{digest}"
        async with self._audit.change("blobs.delete", target, tenant=scope, steps=True, caller=caller) as change:
            if await self._blobs.stat(scope, digest) is None:
                raise NotFound(f"no blob {digest}", field="digest")
            self._require_unneeded(scope, digest)
            derived = await self._cache.forget_blob(scope, digest)
            deleted = 1
            for blob in derived:
                if not self._references.count_of(blob.scope, blob.digest):
                    await self._blobs.delete(blob.scope, blob.digest)
                    deleted += 1
            await self._blobs.delete(scope, digest)
            change.detail = f"{deleted} blobs deleted"
        log.info("blob_deleted", digest=digest, blobs=deleted, by=caller.name)
        return deleted

    def _require_unneeded(self, scope: str, digest: str) -> None:
        for job in self._job_store.open_jobs:
            if job.tenant == scope and any((each.scope, each.digest) == (scope, digest) for each in blobs_of(job)):
                raise FailedPrecondition(f"{job.name} needs it; wait for its end or cancel it first", field="digest")

    async def _delete_blob(self, scope: str, digest: str) -> None:
        """A result: a control image that is cached leaves the cache too."""
        await self._cache.forget_blob(scope, digest)
        await self._blobs.delete(scope, digest)


def _results(job: Job) -> Sequence[BlobInfo]:
    """What its tasks wrote, each once; not an image that the request named."""
    named = {(blob.scope, blob.digest) for blob in job.blobs}
    found = {(output.blob.scope, output.blob.digest): output.blob for task in job.tasks for output in task.outputs}
    return [blob for key, blob in found.items() if key not in named]
