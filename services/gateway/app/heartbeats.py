"""Which workers live and which leases they renew, told to the other gateways: a small record a worker, now and then.

Renewing a lease writes no job. A gateway that a worker talks to writes down what it heard; the others take it as if
they had heard it themselves.
"""

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.leases import Leases
from services.gateway.app.records import Codec
from services.gateway.app.workers import Workers
from services.gateway.jobs.model import Beat
from services.gateway.ports import CaughtUp, Deleted, JobStore

BUCKET = "heartbeats"
# Several between two renewals that would be too late.
BEATS_PER_TTL = 4

BEATS: Codec[Beat] = Codec(Beat)


class Heartbeats:
    def __init__(self, store: JobStore, leases: Leases, workers: Workers) -> None:
        self._store = store
        self._leases = leases
        self._workers = workers
        self._heard: set[str] = set()
        # The revisions of the workers' records, as far as this process knows.
        self._revisions: dict[str, int] = {}

    @property
    def interval_s(self) -> float:
        return self._leases.ttl_s / BEATS_PER_TTL

    def hear(self, worker_id: str) -> None:
        """It said something to this gateway."""
        self._heard.add(worker_id)

    async def beat(self) -> None:
        """Tell the others who was heard since the last time."""
        heard, self._heard = self._heard, set()
        for worker_id in heard:
            held = self._leases.of_worker(worker_id)
            beat = Beat(steps={each.token: (each.step, each.steps) for each in held if each.is_local})
            await self._write(worker_id, BEATS.encode(beat))

    async def _write(self, worker_id: str, value: bytes) -> None:
        """What another gateway wrote meanwhile is as good."""
        revision = self._revisions.get(worker_id, 0)
        try:
            if revision:
                written = await self._store.put(BUCKET, worker_id, value, revision=revision)
            else:
                written = await self._store.create(BUCKET, worker_id, value)
        except (AlreadyExists, Conflict):
            present = await self._store.get(BUCKET, worker_id)
            self._revisions[worker_id] = present.revision if present else 0
            self._heard.add(worker_id)
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
                if not is_old and (beat := BEATS.read(BUCKET, change)):
                    self._take(change.key, beat)

    def _take(self, worker_id: str, beat: Beat) -> None:
        self._workers.heard(worker_id)
        for token, (step, steps) in beat.steps.items():
            self._leases.heard(token, step, steps)

    async def sweep(self) -> None:
        """Forget those whose workers are forgotten."""
        self._heard = {each for each in self._heard if self._workers.is_known(each)}
        for worker_id in [each for each in self._revisions if not self._workers.is_known(each)]:
            del self._revisions[worker_id]
            await self._store.delete(BUCKET, worker_id)
