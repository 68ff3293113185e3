"""Claims of prefetches in the store, so that of several gateways only one has a checkpoint prefetched."""

import hashlib
from dataclasses import dataclass

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.records import Codec, Records
from services.gateway.ports import Clock
from services.gateway.scheduler.replication import Claim
from services.gateway.scheduler.schedule import Scheduler

BUCKET = "prefetches"
PAGE = 1_000
# A claim outlives the expected download by so much.
LATE_FACTOR = 2.0
LATE_S = 60.0
# What a claim lives at most, whatever clocks say.
LIFE_MAX_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """A claim. Times are of the wall clock."""

    model: str
    worker: str
    until_s: float


PREFETCHES: Codec[Prefetch] = Codec(Prefetch)


class PrefetchClaims:
    """Single flight across gateways: the first claim of a checkpoint wins until it ends."""

    def __init__(self, store: Records, scheduler: Scheduler, clock: Clock) -> None:
        self._store = store
        self._scheduler = scheduler
        self._clock = clock

    async def claim(self) -> None:
        """Claim the prefetches that the scheduler has planned; it drops those that another gateway has claimed."""
        for claim in self._scheduler.take_claims():
            holder = await self._holder(claim)
            if holder != claim.worker:
                self._scheduler.refuse(claim, holder, self._clock.monotonic_s())

    async def _holder(self, claim: Claim) -> str:
        """The worker that prefetches the checkpoint for all gateways: the claim's, unless another was faster."""
        key, value = _key(claim.fetch.model), PREFETCHES.encode(self._prefetch(claim))
        try:
            await self._store.create(BUCKET, key, value)
        except AlreadyExists:
            return await self._replace(key, value, claim)
        return claim.worker

    async def _replace(self, key: str, value: bytes, claim: Claim) -> str:
        present = await self._store.get(BUCKET, key)
        if present is None:
            return claim.worker
        before = self._store.read(PREFETCHES, BUCKET, present)
        if before is not None and self._lives(before) and before.worker != claim.worker:
            return before.worker
        try:
            await self._store.put(BUCKET, key, value, revision=present.revision)
        except Conflict:
            return before.worker if before else claim.worker
        return claim.worker

    def _prefetch(self, claim: Claim) -> Prefetch:
        fetch = claim.fetch
        life_s = LATE_FACTOR * (fetch.ready_s - fetch.start_s) + LATE_S
        return Prefetch(model=fetch.model, worker=claim.worker, until_s=self._clock.now_s() + min(LIFE_MAX_S, life_s))

    def _lives(self, prefetch: Prefetch) -> bool:
        """A time further away than any we set comes from a clock that jumped."""
        if not 0 < prefetch.until_s - self._clock.now_s() <= LIFE_MAX_S:
            return False
        state = self._scheduler.worker(prefetch.worker)
        return state is None or prefetch.model not in state.view.held

    async def sweep(self) -> None:
        """Delete claims that have ended."""
        page = await self._store.list(BUCKET, limit=PAGE)
        while page:
            for record in page:
                prefetch = self._store.read(PREFETCHES, BUCKET, record)
                if prefetch is None or not self._lives(prefetch):
                    await self._store.delete(BUCKET, record.key)
            page = await self._store.list(BUCKET, before=page[-1].key, limit=PAGE)


def _key(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()
