"""How far a leased task has come, and for how long it may come no further. Pure: no clock.

Only what was never reached before is progress: a later step, or more bytes of the weights that it waits for. A worker
that reports steps or downloads that go back and forth makes none.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

# How many references of weights count for one task; it names far fewer.
REFERENCES_LIMIT = 64
# Second-order schedulers evaluate the model twice a step; what a worker counts beyond that is no progress.
EVALUATIONS_PER_STEP_MAX = 4


class Phase(StrEnum):
    # It waits for its turn on the device, for weights, or for its first evaluation.
    BEGINNING = "beginning"
    EVALUATING = "evaluating"
    # All is evaluated: it is decoded, encoded and uploaded.
    FINISHING = "finishing"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseProgress:
    """`step`, `steps`: as reported last. The rest is the furthest that was reported."""

    step: int = 0
    steps: int = 0
    # The highest step.
    reached: int = 0
    # By reference of weights, the most bytes.
    fetched: dict[str, int] = field(default_factory=dict)
    # The most bytes of all together that another gateway heard of.
    fetched_elsewhere: int = 0

    @property
    def phase(self) -> Phase:
        if not self.reached:
            return Phase.BEGINNING
        return Phase.EVALUATING if self.reached < self.steps else Phase.FINISHING

    @property
    def fetched_bytes(self) -> int:
        return max(sum(self.fetched.values()), self.fetched_elsewhere)

    def at_step(self, step: int, steps: int, *, evaluations_max: int = 0) -> "LeaseProgress":
        """`evaluations_max`: the highest step that counts; 0 where that is not known."""
        counted = min(step, steps, evaluations_max or steps)
        return replace(self, step=step, steps=steps, reached=max(self.reached, counted))

    def at_bytes(self, reference: str, done_bytes: int, total_bytes: int) -> "LeaseProgress":
        """`total_bytes`: 0 where that is not known."""
        if reference not in self.fetched and len(self.fetched) >= REFERENCES_LIMIT:
            return self
        counted = min(done_bytes, total_bytes) if total_bytes else done_bytes
        return replace(self, fetched=self.fetched | {reference: max(counted, self.fetched.get(reference, 0))})

    def at_bytes_elsewhere(self, fetched_bytes: int) -> "LeaseProgress":
        return replace(self, fetched_elsewhere=max(self.fetched_elsewhere, fetched_bytes))

    def is_beyond(self, before: "LeaseProgress") -> bool:
        """Whether it is further than all that was reached before; bytes count only until the first step."""
        if self.reached != before.reached:
            return self.reached > before.reached
        return not self.reached and self.fetched_bytes > before.fetched_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StallLimits:
    """After how long without progress a lease is lost, however often it is renewed.

    Workers notice a hung device themselves, in half that time; this is for those that cannot or do not.
    """

    # While the model is evaluated: so many times what an evaluation takes there, and never less than the floor.
    factor: float
    floor_s: float
    # Where that is not known, and before and after the evaluations.
    first_s: float
    longest_s: float

    def limit_s(self, progress: LeaseProgress, *, evaluation_s: float | None, slots: int) -> float:
        """`evaluation_s`: as the worker measured it for the task's size; None where it did not.

        `slots`: how many images it may evaluate at a time.
        """
        if progress.phase is not Phase.EVALUATING or not evaluation_s:
            return self.first_s
        return min(self.longest_s, max(self.floor_s, self.factor * evaluation_s * max(1, slots)))
