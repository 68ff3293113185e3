"""Blobs are forgotten once nobody used them for longer than an ended job is kept, and no open job needs them."""

from collections.abc import Iterator

from services.gateway.app.ledger import Ledger
from services.gateway.config import GatewaySettings
from services.gateway.jobs.model import Job
from services.gateway.ports import Budgeted, Clock
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.logs import get_logger

log = get_logger()

# A blob may be as much older than the last word about its job.
GRACE_S = 86_400.0
# Above this part of the budget blobs go that were not used for these times, the longest first. What was used within the
# last of them stays, and uploads are refused.
PRESSED_ABOVE = 0.8
PRESSED_S = (3 * 86_400.0, 86_400.0, 6 * 3_600.0, 3_600.0)


class BlobRetention:
    def __init__(self, ledger: Ledger, blobs: BlobStore, clock: Clock, settings: GatewaySettings) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._clock = clock
        self._settings = settings

    async def make_room(self) -> None:
        """Where the budget is nearly used up, forget the blobs that were not used longest before their time."""
        if not isinstance(self._blobs, Budgeted):
            return
        for older_than_s in PRESSED_S:
            if self._blobs.used_bytes <= PRESSED_ABOVE * self._settings.blob_budget_bytes:
                return
            swept = await self._sweep(older_than_s)
            log.warning("blob_budget_pressed", forgotten=swept, not_used_for_s=older_than_s)

    async def sweep(self) -> None:
        if swept := await self._sweep(self._settings.job_retention_s + GRACE_S):
            log.info("blobs_forgotten", count=swept)

    async def _sweep(self, older_than_s: float) -> int:
        needed = {(blob.scope, blob.digest) for job in self._ledger.open_jobs for blob in blobs_of(job)}
        return await self._blobs.sweep(
            older_than_s=older_than_s,
            now_s=self._clock.now_s(),
            keep=lambda scope, digest: (scope, digest) in needed,
        )


def blobs_of(job: Job) -> Iterator[BlobInfo]:
    """Every blob that the job's tasks read or made."""
    yield from job.blobs
    yield from (image.blob for image in job.control_images if image.blob is not None)
    yield from (output.blob for task in job.tasks for output in task.outputs)
