"""Circuit breakers of a node, one for each thing that tasks need there, such as `embedding:oldstyle`. Pure.

After failures of several jobs in a row the breaker opens: for a while the node gets tasks that need the thing only
where no other worker can do them. Each further failure doubles the time, each success takes one failure back. Workers
of another stage or device of the node have breakers of their own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

FAILURES_ALLOWED = 2
OPEN_FIRST_S = 60.0
OPEN_MAX_S = 3_600.0
FAILURES_MAX = 16
# A failure is forgotten after so long, and the oldest ones of a node above the limit.
FORGET_S = 86_400.0
BREAKERS_LIMIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerKey:
    stage: str
    device: str
    # Such as `checkpoint:starter`, or `stage:diffusion` for all of the stage.
    need: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitBreaker:
    """`count`: failures that no success has offset yet."""

    key: BreakerKey
    count: int
    # Open until then; 0 while closed.
    until_s: float = 0.0
    # When it failed last, and the reason.
    failed_s: float = 0.0
    reason: str = ""

    @property
    def why(self) -> str:
        last = f", the last one with {self.reason}" if self.reason else ""
        return f"{self.count} jobs failed there by it without a success{last}"

    def is_open(self, now_s: float) -> bool:
        """A time further away than any we set comes from a clock that jumped."""
        return 0 < self.until_s - now_s <= OPEN_MAX_S


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBreakers:
    """The latest failure comes last."""

    breakers: tuple[CircuitBreaker, ...] = ()

    def find(self, key: BreakerKey) -> CircuitBreaker | None:
        return next((each for each in self.breakers if each.key == key), None)

    def open(self, now_s: float) -> Iterator[CircuitBreaker]:
        return (each for each in self.breakers if each.is_open(now_s))

    def is_stale(self, now_s: float) -> bool:
        """Nothing in it counts any more."""
        return not any(_counts(each, now_s) for each in self.breakers)


def after_failure(
    breakers: NodeBreakers,
    key: BreakerKey,
    *,
    reason: str = "",
    lease_s: float = math.inf,
    weight: int = 1,
    now_s: float,
) -> NodeBreakers:
    """`lease_s`: when the failed task was leased. Tasks that ran at the same time count once: one may fail them all.

    `weight`: as how many failures it counts; a result that no sound node hands in counts as FAILURES_ALLOWED.
    """
    before = breakers.find(key)
    if before is not None and lease_s < before.failed_s <= now_s:
        return breakers
    count = min(FAILURES_MAX, (before.count if before and _counts(before, now_s) else 0) + weight)
    excess = count - FAILURES_ALLOWED
    until_s = now_s + min(OPEN_MAX_S, OPEN_FIRST_S * 2.0**excess) if excess >= 0 else 0.0
    failed = CircuitBreaker(key=key, count=count, until_s=until_s, failed_s=now_s, reason=reason)
    others = [each for each in breakers.breakers if each.key != key and _counts(each, now_s)]
    return NodeBreakers(breakers=(*others, failed)[-BREAKERS_LIMIT:])


def after_success(breakers: NodeBreakers, keys: Iterable[BreakerKey]) -> NodeBreakers:
    """The same object where there is no failure to take back."""
    done = frozenset(keys)
    if not any(each.key in done for each in breakers.breakers):
        return breakers
    offset = (
        replace(each, count=each.count - 1, until_s=0.0) if each.key in done else each for each in breakers.breakers
    )
    return NodeBreakers(breakers=tuple(each for each in offset if each.count > 0))


def _counts(breaker: CircuitBreaker, now_s: float) -> bool:
    return breaker.is_open(now_s) or 0 <= now_s - breaker.failed_s <= FORGET_S
