"""Ended jobs are kept for a time and up to a number, then they are forgotten with their request ids."""

from fanlight.errors import NotFound
from services.gateway.app.idempotency import Requests
from services.gateway.app.ledger import Ledger
from services.gateway.app.webhooks import Webhooks
from services.gateway.config import GatewaySettings
from services.gateway.ports import Clock
from services.kernel.logs import get_logger

log = get_logger()


class Retention:
    def __init__(
        self, ledger: Ledger, requests: Requests, webhooks: Webhooks, clock: Clock, settings: GatewaySettings
    ) -> None:
        self._ledger = ledger
        self._webhooks = webhooks
        self._requests = requests
        self._clock = clock
        self._settings = settings

    async def sweep(self) -> None:
        ended = self._ledger.ended
        until_s = self._clock.now_s() - self._settings.job_retention_s
        too_many = len(ended) - self._settings.job_retention_count
        for i, (job_id, end_time_s) in enumerate(ended):
            if i >= too_many and end_time_s >= until_s:
                break
            await self._forget(job_id)

    async def _forget(self, job_id: str) -> None:
        try:
            job = await self._ledger.get(job_id)
        except NotFound:
            return
        # The id first: without it the job could not be told apart from one that is still to be made.
        await self._requests.forget(job.request_id, job.tenant)
        await self._webhooks.forget(job)
        await self._ledger.forget(job_id)
        log.info("job_forgotten", job=job.name)
