"""Heartbeats between gateways: which workers live and which leases they renew, one small record per worker.

A renewal writes no job record. The gateway that a worker talks to writes a heartbeat now and then; the others
treat it as if the worker had talked to them.
"""

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.leases import LeaseTable
from services.gateway.app.records import Codec, Records
from services.gateway.app.worker_registry import WorkerRegistry
from services.gateway.domain.job import Heartbeat
from services.gateway.ports import CaughtUp, Deleted

BUCKET = "heartbeats"
# Several heartbeats per time to live, so that a late one loses no lease.
HEARTBEATS_PER_TTL = 4

HEARTBEATS: Codec[Heartbeat] = Codec(Heartbeat)


class Heartbeats:
    """Writes this gateway's heartbeats and takes in those of the others."""

    def __init__(self, store: Records, leases: LeaseTable, workers: WorkerRegistry) -> None:
        self._store = store
        self._leases = leases
        self._workers = workers
        self._callers: set[str] = set()
        # The revisions of the workers' records, as far as this process knows.
        self._revisions: dict[str, int] = {}

    @property
    def interval_s(self) -> float:
        return self._leases.ttl_s / HEARTBEATS_PER_TTL

    def note_call(self, worker_id: str) -> None:
        """The worker called this gateway."""
        self._callers.add(worker_id)

    async def beat(self) -> None:
        """Write a heartbeat for each worker that called since the last time."""
        callers, self._callers = self._callers, set()
        for worker_id in callers:
            held = self._leases.of_worker(worker_id)
            local = [each for each in held if each.is_local]
            heartbeat = Heartbeat(
                steps={each.token: (each.progress.step, each.progress.steps) for each in local},
                fetched={each.token: size for each in local if (size := each.progress.fetched_bytes)},
            )
            await self._write(worker_id, HEARTBEATS.encode(heartbeat))

    async def _write(self, worker_id: str, value: bytes) -> None:
        """On a conflict, retry with the next heartbeat: another gateway wrote one meanwhile."""
        revision = self._revisions.get(worker_id, 0)
        try:
            if revision:
                written = await self._store.put(BUCKET, worker_id, value, revision=revision)
            else:
                written = await self._store.create(BUCKET, worker_id, value)
        except (AlreadyExists, Conflict):
            present = await self._store.get(BUCKET, worker_id)
            self._revisions[worker_id] = present.revision if present else 0
            self._callers.add(worker_id)
        else:
            self._revisions[worker_id] = written.revision

    async def follow(self) -> None:
        is_old = True
        async for change in self._store.watch(BUCKET):
            if isinstance(change, CaughtUp):
                is_old = False
            elif isinstance(change, Deleted):
                self._revisions.pop(change.key, None)
            elif change.revision > self._revisions.get(change.key, 0):
                self._revisions[change.key] = change.revision
                if not is_old and (heartbeat := self._store.read(HEARTBEATS, BUCKET, change)):
                    self._take(change.key, heartbeat)

    def _take(self, worker_id: str, heartbeat: Heartbeat) -> None:
        self._workers.seen_elsewhere(worker_id)
        for token, (step, steps) in heartbeat.steps.items():
            self._leases.renewed_elsewhere(token, step, steps, heartbeat.fetched.get(token, 0))

    async def sweep(self) -> None:
        """Delete the heartbeats of workers that are no longer known."""
        self._callers = {each for each in self._callers if self._workers.is_known(each)}
        for worker_id in [each for each in self._revisions if not self._workers.is_known(each)]:
            del self._revisions[worker_id]
            await self._store.delete(BUCKET, worker_id)
