"""What ordering knows of a waiting task and of a worker. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# A step of priority is worth this much waiting, so that whatever waits comes first at last.
PRIORITY_STEP_S = 30.0

# What a model that is named by a reference may have, of which nobody has said more.
REFERENCE_BYTES = 10**9

# (job id, task number)
Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Tasks of one kind can run in one batch, and on the same workers."""

    stage: str
    # What a worker must offer, such as `annotator:canny`.
    needs: frozenset[str]
    # Empty for stages without. Work stays where it lies: it is large.
    checkpoint: str = ""
    # All models that must be on the node, the checkpoint too. The others go where the work is: they are small.
    models: frozenset[str] = frozenset()
    # LoRAs with their weights, which are part of a batch's UNet.
    loras: tuple[tuple[str, float], ...] = ()
    width_px: int = 0
    height_px: int = 0
    guided: bool = False

    @property
    def combination(self) -> tuple[str, tuple[tuple[str, float], ...]]:
        """What one patched copy of the weights is for."""
        return self.checkpoint, self.loras


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    key: Key
    kind: Kind
    # The smaller, the sooner. Waiting tasks age alike, so their ranks never change places.
    rank_s: float
    # Since when this task could have been leased.
    queue_time_s: float
    # Evaluations of the model; 0 for stages without.
    steps: int = 0
    alone: bool = False
    failed_nodes: frozenset[str] = frozenset()
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as it described itself, made plausible."""

    id: str
    node: str
    stage: str
    # What it offers and may be given now.
    offers: frozenset[str]
    slots: int = 1
    vram: frozenset[str] = frozenset()
    ram: frozenset[str] = frozenset()
    # On disk, in RAM or in VRAM.
    held: frozenset[str] = frozenset()
    # Sizes of the models that it offers, held or not. One that is not in here costs nothing to fetch.
    sizes: Mapping[str, int] = field(default_factory=dict)
    # Bits a second.
    link_bps: float
    step_s: float
    # What a task takes besides its steps.
    task_s: float = 0.0
    # It fetches models ahead when it is told to.
    takes_fetches: bool = False
    # What it may fill with models; 0 where it does not say.
    disk_bytes: int = 0
    # What it was to fetch ahead and could not.
    unfetched: frozenset[str] = frozenset()

    def lacks(self, models: frozenset[str]) -> list[str]:
        """Those that it would have to fetch."""
        return [model for model in models - self.held if self.size_of(model)]

    def size_of(self, model: str) -> int:
        """A guess for a model that a reference names, such as `hf:org/repo`: nobody knows before it is fetched."""
        return self.sizes.get(model, REFERENCE_BYTES if ":" in model or "/" in model else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """A model that a worker should fetch, and when it is expected to have it."""

    model: str
    size_bytes: int
    start_s: float
    ready_s: float
    # A checkpoint; one more node that holds it, apart from any task.
    sticky: bool

    def left_bytes(self, now_s: float) -> float:
        """As expected."""
        whole_s = self.ready_s - self.start_s
        return self.size_bytes * min(1.0, max(0.0, (self.ready_s - now_s) / whole_s)) if whole_s else 0.0
