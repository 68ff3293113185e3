"""One poll: tells the gateway who asks, what it can do and what it holds, and hears which tasks it gets."""

import hashlib
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from fanlight import __version__
from fanlight.contract.revision import contract_revision
from fanlight.queue.v1 import queue_pb2
from services.worker.goodput import Goodput
from services.worker.leases import Leases
from services.worker.ports import Stage
from services.worker.prefetcher import Prefetcher
from services.worker.queue_calls import QueueCalls


class Poller:
    def __init__(
        self,
        stage: Stage[Any],
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
        # What the stage gave last, what is sent of it, and that one's digest.
        self._given: queue_pb2.Capabilities | None = None
        self._sent = queue_pb2.Capabilities()
        self._digest = b""
        # The digest of the capabilities that the gateway knows.
        self._known = b""

    async def poll(self, *, max_tasks: int, wait_s: float, draining: bool = False) -> Sequence[queue_pb2.LeasedTask]:
        self._prefetcher.came.clear()
        capabilities, digest = self._capabilities()
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

    def _capabilities(self) -> tuple[queue_pb2.Capabilities, bytes]:
        given = self._stage.capabilities()
        if given is not self._given:
            self._given = given
            self._sent = canonical(given, self._stage.request_type)
            self._digest = hashlib.sha256(self._sent.SerializeToString(deterministic=True)).digest()
        return self._sent, self._digest

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


def canonical(capabilities: queue_pb2.Capabilities, request_type: type[Message]) -> queue_pb2.Capabilities:
    """The same for all workers that can do the same, in whatever order they list it; with the contract's revision."""
    result = queue_pb2.Capabilities()
    result.CopyFrom(capabilities)
    result.annotators.sort(key=lambda each: each.id)
    result.models.sort(key=lambda each: (each.kind, each.id))
    result.offers[:] = sorted(set(capabilities.offers))
    result.limits.sort(key=lambda each: each.name)
    result.contract.CopyFrom(contract_revision(request_type))
    return result
