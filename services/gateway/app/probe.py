"""Whether the store takes writes: a small record, written anew when somebody asks, but not too often."""

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.ports import Clock, JobStore

BUCKET = "probes"
KEY = "0"
EVERY_S = 5.0


class Probe:
    def __init__(self, store: JobStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._good_until_s = 0.0

    async def write(self) -> None:
        """Unavailable where the store takes nothing."""
        now_s = self._clock.monotonic_s()
        if now_s < self._good_until_s:
            return
        value = str(self._clock.now_s()).encode()
        record = await self._store.get(BUCKET, KEY)
        try:
            if record is None:
                await self._store.create(BUCKET, KEY, value)
            else:
                await self._store.put(BUCKET, KEY, value, revision=record.revision)
        except (AlreadyExists, Conflict):
            # Another gateway's write went through just now, and this one was looked at.
            pass
        self._good_until_s = now_s + EVERY_S
