"""What is deleted by age: ended jobs with their request ids, and blobs that no open job needs.

While the wall clock cannot be trusted, nothing is deleted.
"""

from collections import Counter
from collections.abc import Sequence

from fanlight.errors import NotFound
from services.gateway.app.job_store import IdempotencyKeys, JobStore
from services.gateway.app.quotas import Quotas
from services.gateway.app.records import UnreadableRecord
from services.gateway.app.webhooks import Webhooks
from services.gateway.config import GatewaySettings
from services.gateway.domain.job import blobs_of
from services.gateway.ports import Budgeted, Clock
from services.kernel.blobs import BlobStore
from services.kernel.logs import get_logger

log = get_logger()

# Drift and leap seconds are less in the time between two checks.
JUMP_S = 60.0
# A clock that was set wrong is often set right soon.
DISTRUST_S = 3_600.0
# A blob's last use may be so much earlier than the end of its job.
GRACE_S = 86_400.0
# Above this part of the budget, blobs unused for these times are evicted early, the longest time first. What was used
# within the last of them stays, and uploads are refused.
EVICT_ABOVE = 0.8
EVICT_UNUSED_S = (3 * 86_400.0, 86_400.0, 6 * 3_600.0, 3_600.0)


class ClockWatch:
    """Whether the wall clock has jumped lately against the monotonic one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._apart_s = self._apart()
        self._jumped_s: float | None = None

    def _apart(self) -> float:
        return self._clock.now_s() - self._clock.monotonic_s()

    def is_settled(self) -> bool:
        """Call it from time to time: it compares the clocks with the last time."""
        apart_s, now_s = self._apart(), self._clock.monotonic_s()
        if abs(apart_s - self._apart_s) > JUMP_S:
            log.warning("clock_jumped", by_s=round(apart_s - self._apart_s))
            self._jumped_s = now_s
        self._apart_s = apart_s
        return self._jumped_s is None or now_s - self._jumped_s > DISTRUST_S


class JobRetention:
    """Deletes ended jobs that are too old or too many for their tenant, with their request ids and deliveries.

    A job whose webhook is still to be delivered stays, so that its delivery has something to say.
    """

    def __init__(
        self, jobs: JobStore, requests: IdempotencyKeys, webhooks: Webhooks, clock: Clock, quotas: Quotas
    ) -> None:
        self._job_store = jobs
        self._webhooks = webhooks
        self._requests = requests
        self._clock = clock
        self._quotas = quotas

    async def sweep(self) -> None:
        if not self._webhooks.caught_up:
            return
        for job_id in self._too_old():
            await self._forget(job_id)

    def _too_old(self) -> Sequence[str]:
        """The earliest end first."""
        ended, now_s = self._job_store.ended, self._clock.now_s()
        # How many of each tenant's have not ended earlier, this one too.
        left = Counter(each.tenant for each in ended)
        old = []
        for each in ended:
            limits = self._quotas.limits_of(each.tenant)
            assert limits.history_jobs is not None
            assert limits.history_s is not None
            is_too_old = left[each.tenant] > limits.history_jobs or each.end_s < now_s - limits.history_s
            left[each.tenant] -= 1
            if is_too_old and not self._webhooks.is_open(each.id):
                old.append(each.id)
        return old

    async def _forget(self, job_id: str) -> None:
        try:
            job = await self._job_store.get(job_id)
        except (NotFound, UnreadableRecord):
            return
        # The request id first: a request id without its job looks like a job that is still to be created.
        await self._requests.forget(job.request_id, job.tenant)
        await self._webhooks.forget(job)
        await self._job_store.forget(job_id)
        log.info("job_deleted", job=job.name)


class BlobRetention:
    """Evicts blobs unused for longer than ended jobs are kept, never one that an open job needs."""

    def __init__(
        self, jobs: JobStore, blobs: BlobStore, clock: Clock, settings: GatewaySettings, quotas: Quotas
    ) -> None:
        self._job_store = jobs
        self._blobs = blobs
        self._clock = clock
        self._settings = settings
        self._quotas = quotas

    async def make_room(self) -> None:
        """Where the budget is nearly used up, evict early: the least recently used blobs first."""
        if not isinstance(self._blobs, Budgeted):
            return
        for older_than_s in EVICT_UNUSED_S:
            if self._blobs.used_bytes <= EVICT_ABOVE * self._settings.blob_budget_bytes:
                return
            swept = await self._sweep(older_than_s)
            log.warning("blobs_evicted_early", count=swept, unused_for_s=older_than_s)

    async def sweep(self) -> None:
        if swept := await self._sweep(self._quotas.longest_history_s + GRACE_S):
            log.info("blobs_evicted", count=swept)

    async def _sweep(self, older_than_s: float) -> int:
        needed = {(blob.scope, blob.digest) for job in self._job_store.open_jobs for blob in blobs_of(job)}
        return await self._blobs.sweep(
            older_than_s=older_than_s,
            now_s=self._clock.now_s(),
            keep=lambda scope, digest: (scope, digest) in needed,
        )
