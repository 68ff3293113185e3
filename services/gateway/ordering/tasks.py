"""What ordering knows of a waiting task and of the worker that asks."""

from dataclasses import dataclass, field

# A step of priority is worth this much waiting, so that whatever waits comes first at last.
PRIORITY_STEP_S = 30.0

# (job id, task number)
Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Tasks of one kind can run in one batch, and on the same workers."""

    stage: str
    # What a worker must offer, such as `annotator:canny`.
    needs: frozenset[str]
    # Empty for stages without.
    checkpoint: str = ""
    width_px: int = 0
    height_px: int = 0
    guided: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    key: Key
    kind: Kind
    priority: int
    # When its job came: what is begun goes before what came later.
    create_time_s: float
    # Since when this task could have been leased.
    queue_time_s: float
    alone: bool = False
    failed_nodes: frozenset[str] = frozenset()

    @property
    def rank_s(self) -> float:
        """The smaller, the sooner. Waiting tasks age alike, so their ranks never change places."""
        return self.create_time_s - self.priority * PRIORITY_STEP_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """The worker that wants work."""

    node: str
    stage: str
    offers: frozenset[str]
    vram_models: frozenset[str] = field(default=frozenset())
    ram_models: frozenset[str] = field(default=frozenset())
    disk_models: frozenset[str] = field(default=frozenset())

    def can(self, kind: Kind) -> bool:
        return kind.stage == self.stage and kind.needs <= self.offers
