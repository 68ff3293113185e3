"""Workers as values, and what each announced. Pure."""

from dataclasses import dataclass

from fanlight.contract.defaults import NO_DEFAULTS, Defaults
from fanlight.contract.parameters import Parameter

CHECKPOINT = "checkpoint"
# The id of the checkpoint that ships.
STARTER = "starter"
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
class AnnouncedAnnotator:
    """An annotator as a worker announced it."""

    id: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    deterministic: bool = False
    weight_bytes: int = 0
    controlnets: tuple[str, ...] = ()
    version: str = ""
    device: str = ""
    license: str = ""
    # Names that other services use for it.
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedModel:
    """A checkpoint, LoRA, VAE or other model as a worker announced it."""

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
    # Of a checkpoint; 0 where unknown.
    text_encoder_layers: int = 0
    # What is unusual about it, in the worker's own words.
    note: str = ""
    # Of a checkpoint: what requests get that leave these options out.
    defaults: Defaults = NO_DEFAULTS


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedLeftOut:
    """A file or folder that a worker found among its models and does not use, and why, in its own words."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a worker can do, whatever it has loaded."""

    annotators: tuple[AnnouncedAnnotator, ...] = ()
    models: tuple[AnnouncedModel, ...] = ()
    # Such as `scheduler:euler_a`; sorted.
    other_offers: tuple[str, ...] = ()
    # Upper limits by name, such as `pixels`; sorted.
    limits: tuple[tuple[str, int], ...] = ()
    # What is among its models and not used; perhaps not all of the count.
    left_out: tuple[AnnouncedLeftOut, ...] = ()
    left_out_count: int = 0

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
        """`limits` and those of its checkpoints, such as the layers of the text encoder; sorted."""
        layers = {
            f"{TEXT_ENCODER_LAYERS}:{model.id}": model.text_encoder_layers
            for model in self.models
            if model.text_encoder_layers
        }
        return tuple(sorted((layers | dict(self.limits)).items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOutOfFleet:
    """What all workers together do not use: each with up to five nodes that have it. `count`: listed or not."""

    listed: tuple[tuple[AnnouncedLeftOut, tuple[str, ...]], ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedStepTime:
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
    # As the worker measured them.
    step_times: tuple[ReportedStepTime, ...] = ()
    draining: bool = False
    vram_bytes: int = 0
    # The standard deviation of the measured goodput.
    goodput_deviation_bps: float = 0.0
    # It prefetches the models that the gateway names.
    takes_fetches: bool = False
    disk_bytes: int = 0
    # Models that it could not prefetch.
    unfetched_models: frozenset[str] = frozenset()

    @property
    def held_models(self) -> frozenset[str]:
        return self.vram_models | self.ram_models | self.disk_models


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A worker as stored. `last_poll_time_s` is written now and then, not with every poll."""

    worker: Worker
    # The key of its capabilities, which are stored once for all workers that announce the same.
    capabilities_digest: str
    # The digest that the worker sends for them in its polls. Not trusted: only compared with the same worker's.
    announced_digest: str = ""
    last_poll_time_s: float
    # Hexadecimal sha256 of what its process sends with its polls; empty for one that sends nothing.
    secret_hash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Avoidance:
    """Tasks that a worker gets only where no other worker can do them."""

    # What such tasks need, such as `embedding:oldstyle`; `stage:diffusion` for all of a stage.
    need: str
    # In a sentence.
    why: str
    # 0 for as long as the worker announces it so.
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    worker: Worker
    last_poll_time_s: float
    live: bool
    # Names of the tasks it has leased.
    tasks: tuple[str, ...]
    # Why the gateway gives it no tasks that others can do; empty while it does.
    draining_reason: str = ""
    avoided: tuple[Avoidance, ...] = ()
