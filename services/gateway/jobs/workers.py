"""What workers said about themselves. Values only."""

from dataclasses import dataclass

from fanlight.contract.parameter_values import Parameter

CHECKPOINT = "checkpoint"
CONTROLNET = "controlnet"
LORA = "lora"
VAE = "vae"
EMBEDDING = "embedding"
ANNOTATOR = "annotator"
# Of a checkpoint, as the name of a limit: `text_encoder_layers:starter`.
TEXT_ENCODER_LAYERS = "text_encoder_layers"
# Where a model is, by the contract's numbers; REMOTE is known, and fetched when asked for.
REMOTE, DISK, RAM, VRAM = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    id: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    deterministic: bool = False
    weight_bytes: int = 0
    controlnets: tuple[str, ...] = ()
    version: str = ""
    device: str = ""
    license: str = ""
    # Other services' names for it.
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    kind: str
    is_default: bool = False
    size_bytes: int = 0
    license: str = ""
    pipelines: tuple[str, ...] = ()
    width_px: int = 0
    height_px: int = 0
    size_step_px: int = 0
    family: str = ""
    schedulers: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    # Of a checkpoint; 0 where not known yet.
    text_encoder_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a worker can do, whatever it has loaded."""

    annotators: tuple[Annotator, ...] = ()
    models: tuple[Model, ...] = ()
    # Such as `scheduler:euler_a`; sorted.
    other_offers: tuple[str, ...] = ()
    # The largest that it takes, by name, such as `pixels`; sorted.
    limits: tuple[tuple[str, int], ...] = ()

    @property
    def offers(self) -> frozenset[str]:
        """What tasks can need of a worker, such as `annotator:canny`, `checkpoint:starter`, `scheduler:euler_a`."""
        return frozenset(
            [
                *(f"{ANNOTATOR}:{annotator.id}" for annotator in self.annotators),
                *(f"{model.kind}:{model.id}" for model in self.models),
                *self.other_offers,
            ]
        )

    @property
    def all_limits(self) -> tuple[tuple[str, int], ...]:
        """Those of its checkpoints too, such as the layers of the text encoder; sorted."""
        layers = {
            f"{TEXT_ENCODER_LAYERS}:{model.id}": model.text_encoder_layers
            for model in self.models
            if model.text_encoder_layers
        }
        return tuple(sorted((layers | dict(self.limits)).items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """How long one evaluation takes for images of one family and size class."""

    # Empty where the checkpoint has none.
    family: str
    size_class: int
    mean_s: float
    # 0 where unknown.
    deviation_s: float = 0.0


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
    # As it measured them.
    step_times: tuple[StepTime, ...] = ()
    draining: bool = False
    vram_bytes: int = 0
    # How far the measured goodput strays from its mean.
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
    # Under which its capabilities are kept, once for all workers that announce the same.
    capabilities_digest: str
    # What the worker calls them in its polls. It says nothing of their content: only the worker itself is asked by it.
    announced_digest: str = ""
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
