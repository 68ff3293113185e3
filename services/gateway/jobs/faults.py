"""What a node failed at lately, and how long it is left out of that. Pure.

A node that reports a failure of one thing several times in a row, such as of `checkpoint:starter`, gets no more tasks
for that thing for a while; each further failure doubles the while, each success takes one failure back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

FAILURES_ALLOWED = 2
SKIP_FIRST_S = 60.0
SKIP_MAX_S = 3_600.0
FAILURES_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Strikes:
    """Failures that no success has made up for yet."""

    count: int
    # Left out until then; 0 while it is not.
    until_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFaults:
    """By what a task needs, such as `annotator:canny`."""

    of: Mapping[str, Strikes] = field(default_factory=dict)

    def skipped(self, now_s: float) -> frozenset[str]:
        """What the node is left out of. A time further away than any we set comes from a clock that jumped."""
        return frozenset(need for need, strikes in self.of.items() if 0 < strikes.until_s - now_s <= SKIP_MAX_S)


def after_failure(faults: NodeFaults, need: str, *, now_s: float) -> NodeFaults:
    before = faults.of.get(need)
    count = min(FAILURES_MAX, (before.count if before else 0) + 1)
    over = count - FAILURES_ALLOWED
    until_s = now_s + min(SKIP_MAX_S, SKIP_FIRST_S * 2.0**over) if over >= 0 else 0.0
    return NodeFaults(of={**faults.of, need: Strikes(count=count, until_s=until_s)})


def after_success(faults: NodeFaults, need: str) -> NodeFaults:
    """The very same where there is nothing to take back."""
    before = faults.of.get(need)
    if before is None:
        return faults
    others = {each: strikes for each, strikes in faults.of.items() if each != need}
    return NodeFaults(of=others | ({need: Strikes(count=before.count - 1)} if before.count > 1 else {}))
