"""Blobs are forgotten once nobody used them for longer than an ended job is kept, and no open job needs them."""

from collections.abc import Iterator

from services.gateway.app.ledger import Ledger
from services.gateway.config import GatewaySettings
from services.gateway.jobs.model import Generation, Job
from services.gateway.ports import Clock
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.logs import get_logger

log = get_logger()

# A blob may be as much older than the last word about its job.
GRACE_S = 86_400.0


class BlobRetention:
    def __init__(self, ledger: Ledger, blobs: BlobStore, clock: Clock, settings: GatewaySettings) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._clock = clock
        self._settings = settings

    async def sweep(self) -> None:
        needed = {(blob.scope, blob.digest) for job in self._ledger.open_jobs for blob in blobs_of(job)}
        swept = await self._blobs.sweep(
            older_than_s=self._settings.job_retention_s + GRACE_S,
            now_s=self._clock.now_s(),
            keep=lambda scope, digest: (scope, digest) in needed,
        )
        if swept:
            log.info("blobs_forgotten", count=swept)


def blobs_of(job: Job) -> Iterator[BlobInfo]:
    """Every blob that the job's tasks read or made."""
    if isinstance(job.work, Generation):
        given = (job.work.image, job.work.mask, *(control.picture for control in job.work.controls))
        yield from (blob for blob in given if blob is not None)
    else:
        yield job.work.picture
    yield from (image.blob for image in job.control_images if image.blob is not None)
    yield from (output.blob for task in job.tasks for output in task.outputs)
