"""Fair shares between tenants: a rank for every job when it comes. Pure.

A tenant's jobs are ranked as if it had the fleet divided evenly with those who also ask: what it asks for beyond its
share moves its later jobs back, and nobody else's. A rank never changes, so that what waits comes first at last; a
tenant's own jobs keep their order.
"""

from collections.abc import Iterable

from services.gateway.ordering.tasks import PRIORITY_STEP_S

# Of all tenants those that are furthest behind are forgotten first; they have nothing to be held back for.
TENANTS_LIMIT = 10_000


class Shares:
    def __init__(self) -> None:
        # When each tenant's jobs so far would be done at its share.
        self._done_s: dict[str, float] = {}

    def rank_s(self, tenant: str, *, create_time_s: float, priority: int, work_s: float, slots: int) -> float:
        """`work_s`: what the whole job takes on one slot of the `slots` that there are."""
        start_s = max(create_time_s, self._done_s.get(tenant, 0.0))
        asking = len([None for each_s in self._done_s.values() if each_s > create_time_s])
        asking += tenant not in self._done_s or self._done_s[tenant] <= create_time_s
        self._done_s[tenant] = start_s + work_s * asking / max(1, slots)
        if len(self._done_s) > TENANTS_LIMIT:
            self._forget(create_time_s)
        return start_s - priority * PRIORITY_STEP_S

    def _forget(self, until_s: float) -> None:
        behind: Iterable[str] = [tenant for tenant, done_s in self._done_s.items() if done_s <= until_s]
        for tenant in behind or [min(self._done_s, key=lambda each: self._done_s[each])]:
            del self._done_s[tenant]
