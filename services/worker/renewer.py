"""Keeps the leases alive while their tasks run, and hears what the gateway says to them."""

from fanlight.errors import FanlightError
from fanlight.queue.v1 import queue_pb2
from services.kernel.logs import get_logger
from services.worker.leases import Leases
from services.worker.patience import Backoff
from services.worker.prefetcher import Prefetcher
from services.worker.queue_calls import QueueCalls
from services.worker.surroundings import Surroundings, unless

log = get_logger()

# How long to sleep while nothing is held; a new lease wakes it.
IDLE_S = 60.0
# While the gateway is away a renewal waits for the connection by itself.
PAUSE_MAX_S = 1.0


class Renewer:
    """A gateway that does not answer ends no work: it decides, once it is back, whose the task is."""

    def __init__(
        self,
        queue: QueueCalls,
        leases: Leases,
        prefetcher: Prefetcher,
        surroundings: Surroundings,
        *,
        worker_id: str,
        retry_delay_max_s: float,
    ) -> None:
        self._prefetcher = prefetcher
        self._queue = queue
        self._leases = leases
        self._surroundings = surroundings
        self._worker_id = worker_id
        self._backoff = Backoff(surroundings, max_s=min(PAUSE_MAX_S, retry_delay_max_s))

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await self._until_due()
            try:
                await self._renew()
            except FanlightError as error:
                pause_s = self._backoff.next_s(error)
                log.warning("renewal_failed", reason=error.reason, leases=len(self._leases), pause_s=round(pause_s, 2))
                await self._surroundings.pause(pause_s)
            else:
                self._backoff.reset()

    async def _until_due(self) -> None:
        while (wait_s := self._leases.due_s - self._surroundings.now_s()) > 0:
            self._leases.stirred.clear()
            await unless(self._surroundings.pause(min(wait_s, IDLE_S)), self._leases.stirred.wait())

    async def _renew(self) -> None:
        sent_s = self._surroundings.now_s()
        renewals = self._leases.take_renewals(now_s=sent_s)
        answer = await self._queue.renew(queue_pb2.RenewLeasesRequest(worker_id=self._worker_id, renewals=renewals))
        self._leases.note(list(answer.leases), now_s=sent_s)
        if answer.has_fetches:
            self._prefetcher.want(answer.fetches)
