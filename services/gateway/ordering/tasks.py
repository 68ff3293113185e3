"""What ordering knows of a waiting task and of a worker. Values only."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

# A step of priority is worth this much waiting, so that whatever waits comes first at last.
PRIORITY_STEP_S = 30.0

# What a model that is named by a reference may have, of which nobody has said more.
REFERENCE_BYTES = 10**9

# One evaluation where nothing was measured: 512 x 512 pixels, which are of this size class, on a small card.
USUAL_STEP_S = 0.3
USUAL_SIZE_CLASS = 18

# (job id, task number)
Key = tuple[str, int]
# How much of something a task takes, or a worker at most, by name such as `pixels`; sorted.
Amounts = tuple[tuple[str, int], ...]
# Seconds for one evaluation, by model family and size class.
StepTimes = Mapping[tuple[str, int], float]


def can_do(offers: frozenset[str], limits: Amounts, needs: frozenset[str], amounts: Amounts) -> bool:
    """Whether a worker can do a task: it offers all needs, and takes each amount. Where it has no limit it takes any.

    The one place that says so: for a worker, for a group of workers and for all that are known.
    """
    return needs <= offers and (not amounts or next(exceeded(limits, amounts), None) is None)


def exceeded(limits: Amounts, amounts: Amounts) -> Iterator[tuple[str, int, int]]:
    """Name, limit and amount of each limit that is too low."""
    for name, amount in amounts:
        limit = limit_of(limits, name)
        if limit is not None and amount > limit:
            yield name, limit, amount


def limit_of(limits: Amounts, name: str) -> int | None:
    """None where there is no bound."""
    place = bisect_left(limits, (name,))
    if place < len(limits) and limits[place][0] == name:
        return limits[place][1]
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Tasks of one kind can run in one batch, and on the same workers."""

    stage: str
    # What a worker must offer, such as `annotator:canny`.
    needs: frozenset[str]
    # What it must take at least, such as `pixels`.
    amounts: Amounts = ()
    # Empty for stages without. Work stays where it lies: it is large.
    checkpoint: str = ""
    # Of its checkpoint; empty where that is not known before it is fetched.
    family: str = ""
    # All models that must be on the node, the checkpoint too. The others go where the work is: they are small.
    models: frozenset[str] = frozenset()
    # LoRAs with their weights, which are part of a batch's UNet.
    loras: tuple[tuple[str, float], ...] = ()
    width_px: int = 0
    height_px: int = 0
    # What `fanlight.contract` makes of the size; 0 where the size is not known before the work begins.
    size_class: int = 0
    guided: bool = False

    def __post_init__(self) -> None:
        assert bool(self.size_class) == bool(self.width_px and self.height_px), "a size and its class go together"

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
    # The most that it takes, by name; sorted.
    limits: Amounts = ()
    slots: int = 1
    vram: frozenset[str] = frozenset()
    ram: frozenset[str] = frozenset()
    # On disk, in RAM or in VRAM.
    held: frozenset[str] = frozenset()
    # Sizes of the models that it offers, held or not. One that is not in here costs nothing to fetch.
    sizes: Mapping[str, int] = field(default_factory=dict)
    # Bits a second.
    link_bps: float
    # As it measured them.
    step_times: StepTimes = field(default_factory=dict)
    # What is usual for workers on the same device.
    usual_times: StepTimes = field(default_factory=dict)
    # What a task takes besides its steps.
    task_s: float = 0.0
    # It fetches models ahead when it is told to.
    takes_fetches: bool = False
    # What it may fill with models; 0 where it does not say.
    disk_bytes: int = 0
    # What it was to fetch ahead and could not.
    unfetched: frozenset[str] = frozenset()

    def can_do(self, kind: Kind) -> bool:
        return can_do(self.offers, self.limits, kind.needs, kind.amounts)

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
