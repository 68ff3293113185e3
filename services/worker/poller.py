"""One poll: tells the gateway who asks, what it can do and what it holds, and hears which tasks it gets."""

import hashlib
from collections.abc import Sequence

from fanlight import __version__
from fanlight.queue.v1 import queue_pb2
from services.worker.goodput import Goodput
from services.worker.leases import Leases
from services.worker.ports import Stage
from services.worker.prefetcher import Prefetcher
from services.worker.queue_calls import QueueCalls


class Poller:
    def __init__(
        self,
        stage: Stage,
        leases: Leases,
        queue: QueueCalls,
        goodput: Goodput,
        prefetcher: Prefetcher,
        *,
        worker_id: str,
        node: str,
        slots: int,
    ) -> None:
        self.worker_id = worker_id
        self._stage = stage
        self._leases = leases
        self._queue = queue
        self._goodput = goodput
        self._prefetcher = prefetcher
        self._node = node
        self._slots = slots
        # The digest of the capabilities that the gateway knows.
        self._known = b""

    async def poll(self, *, max_tasks: int, wait_s: float, draining: bool = False) -> Sequence[queue_pb2.LeasedTask]:
        self._prefetcher.came.clear()
        capabilities = self._stage.capabilities()
        digest = hashlib.sha256(capabilities.SerializeToString(deterministic=True)).digest()
        request = queue_pb2.LeaseTasksRequest(
            worker=self._worker(),
            capabilities_digest=digest,
            capabilities=None if digest == self._known else capabilities,
            max_tasks=max_tasks,
            held_lease_tokens=self._leases.tokens,
            wait_s=wait_s,
            draining=draining,
        )
        answer = await self._queue.lease(request)
        self._known = b"" if answer.wants_capabilities else digest
        if answer.has_fetches:
            self._prefetcher.want(answer.fetches)
        return answer.tasks

    def _worker(self) -> queue_pb2.Worker:
        worker = queue_pb2.Worker()
        self._stage.describe(worker)
        worker.id = self.worker_id
        worker.node = self._node
        worker.stage = self._stage.name
        worker.version = __version__
        worker.slots = self._slots
        if not worker.goodput_bps:
            worker.goodput_bps = self._goodput.bps
            worker.goodput_deviation_bps = self._goodput.deviation_bps
        worker.takes_fetches = self._prefetcher.is_able
        worker.unfetched_models[:] = self._prefetcher.unfetched
        return worker
