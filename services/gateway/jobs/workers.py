"""What workers said about themselves, and the catalog of everything they offer together. Values only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.kernel.parameters import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    id: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    deterministic: bool = False
    weight_bytes: int = 0
    loaded: bool = False
    controlnets: tuple[str, ...] = ()
    version: str = ""
    device: str = ""
    licence: str = ""
    # Other services' names for it.
    aliases: tuple[str, ...] = ()


CHECKPOINT = "checkpoint"
CONTROLNET = "controlnet"
# The contract's number for a model that is known, and fetched when asked for.
REMOTE = 1
LORA = "lora"
VAE = "vae"
EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    kind: str
    is_default: bool = False
    # A number of the contract's enum.
    residency: int = 0
    size_bytes: int = 0
    licence: str = ""
    pipelines: tuple[str, ...] = ()
    width_px: int = 0
    height_px: int = 0
    size_step_px: int = 0
    family: str = ""
    schedulers: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    annotators: tuple[Annotator, ...] = ()
    models: tuple[Model, ...] = ()

    @property
    def offers(self) -> frozenset[str]:
        """What tasks can need of a worker, such as `annotator:canny`, `checkpoint:starter`, `controlnet:canny`."""
        return frozenset(
            [f"annotator:{annotator.id}" for annotator in self.annotators]
            + [f"{model.kind}:{model.id}" for model in self.models]
        )

    def annotator(self, annotator_id: str) -> Annotator:
        """One that is offered."""
        return next(annotator for annotator in self.annotators if annotator.id == annotator_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    id: str
    node: str
    stage: str
    version: str = ""
    device: str = ""
    slots: int = 1
    vram_models: frozenset[str] = frozenset()
    ram_models: frozenset[str] = frozenset()
    disk_models: frozenset[str] = frozenset()
    goodput_bps: float = 0.0
    step_s: float = 0.0
    draining: bool = False
    vram_bytes: int = 0
    # How far the measured values stray from their means.
    step_s_deviation: float = 0.0
    goodput_deviation_bps: float = 0.0
    # It fetches models ahead when it is told to.
    takes_fetches: bool = False
    disk_bytes: int = 0
    # Models that it was to fetch ahead and could not.
    unfetched_models: frozenset[str] = frozenset()

    @property
    def held_models(self) -> frozenset[str]:
        return self.vram_models | self.ram_models | self.disk_models


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A worker as the store keeps it. `last_poll_time_s` is written now and then, not with every poll."""

    worker: Worker
    capabilities: Capabilities
    # Hexadecimal sha256, chosen by the worker.
    capabilities_digest: str
    last_poll_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    worker: Worker
    last_poll_time_s: float
    live: bool
    # Names of the tasks it has leased.
    tasks: tuple[str, ...]
    # Why the gateway gives it no more; empty while it does.
    draining_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All that the known workers offer; of two with the same id, and family, the first one counts."""

    annotators: dict[str, Annotator] = field(default_factory=dict)
    # By kind, id and family: several families have a ControlNet `canny`.
    models: dict[tuple[str, str, str], Model] = field(default_factory=dict)
    # Stages that some worker was ever seen for.
    stages: frozenset[str] = frozenset()

    def annotator(self, name: str) -> Annotator | None:
        """The one of this id, else the first that has the name for an alias."""
        by_alias = (each for each in self.annotators.values() if name in each.aliases)
        return self.annotators.get(name) or next(by_alias, None)

    def of_kind(self, kind: str) -> list[Model]:
        return [model for model in self.models.values() if model.kind == kind]


def catalog_of(stages: Iterable[str], capabilities: Sequence[Capabilities]) -> Catalog:
    annotators: dict[str, Annotator] = {}
    models: dict[tuple[str, str, str], Model] = {}
    for each in capabilities:
        for annotator in each.annotators:
            annotators.setdefault(annotator.id, annotator)
        for model in each.models:
            models.setdefault((model.kind, model.id, model.family), model)
    return Catalog(annotators=annotators, models=models, stages=frozenset(stages))
