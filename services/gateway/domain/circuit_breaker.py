"""Circuit breakers of a node, one for each thing that tasks need, such as `checkpoint:starter`. Pure.

After several failures in a row the breaker opens: the node gets no tasks that need the thing for a while. Each further
failure doubles the back-off, each success takes one failure back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fanlight.errors import FailedPrecondition, NotFound, ResultRefused, TooLarge

# What a sound node reports that lacks something that one request needs, or whose result the gateway refused. The task
# is retried on another node; neither a circuit breaker nor the straggler detector counts it.
NOT_HERE = frozenset({NotFound.reason, FailedPrecondition.reason, TooLarge.reason, ResultRefused.reason})
FAILURES_ALLOWED = 2
OPEN_FIRST_S = 60.0
OPEN_MAX_S = 3_600.0
FAILURES_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitBreaker:
    """`count`: failures that no success has offset yet."""

    count: int
    # Open until then; 0 while closed.
    until_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBreakers:
    """By what a task needs, such as `annotator:canny`."""

    of: Mapping[str, CircuitBreaker] = field(default_factory=dict)

    def open_needs(self, now_s: float) -> frozenset[str]:
        """What the node gets no tasks for. A time further away than any we set comes from a clock that jumped."""
        return frozenset(need for need, breaker in self.of.items() if 0 < breaker.until_s - now_s <= OPEN_MAX_S)


def after_failure(breakers: NodeBreakers, need: str, *, now_s: float) -> NodeBreakers:
    before = breakers.of.get(need)
    count = min(FAILURES_MAX, (before.count if before else 0) + 1)
    excess = count - FAILURES_ALLOWED
    until_s = now_s + min(OPEN_MAX_S, OPEN_FIRST_S * 2.0**excess) if excess >= 0 else 0.0
    return NodeBreakers(of={**breakers.of, need: CircuitBreaker(count=count, until_s=until_s)})


def after_success(breakers: NodeBreakers, need: str) -> NodeBreakers:
    """The same object where there is no failure to take back."""
    before = breakers.of.get(need)
    if before is None:
        return breakers
    others = {each: breaker for each, breaker in breakers.of.items() if each != need}
    return NodeBreakers(of=others | ({need: CircuitBreaker(count=before.count - 1)} if before.count > 1 else {}))
