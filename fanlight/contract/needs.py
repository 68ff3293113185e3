"""The needs of a resolved request: what a worker must offer, and the contract revision that it must know.

`Capabilities.offers` holds offers such as `scheduler:euler_a`, `Capabilities.limits` limits such as `pixels`. A worker
that announces no limit of a name has none. Fields are only ever added, never reused: a field that a side does not know
is refused or becomes a need, never dropped silently.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fanlight.contract.generation import OFF, parsed_prompts
from fanlight.contract.names import need
from fanlight.contract.prompt import ORIGINAL, STRICT
from fanlight.contract.schedulers import is_known_to_all, resolve
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import InvalidField
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest
from fanlight.queue.v1.queue_pb2 import ContractRevision, KnownMessage

# Kinds of models, as in diffusion.v1.Model.
CHECKPOINT, CONTROLNET, LORA, VAE, EMBEDDING = "checkpoint", "controlnet", "lora", "vae", "embedding"
# Kinds of other offers.
ANNOTATOR, SCHEDULER, SAFETY_CHECKER, PRECISION = "annotator", "scheduler", "safety_checker", "precision"
# Of a worker that knows `prompt_syntax`, `emphasis` and `sdxl_clip_skip`, prompts that change and AND.
WHOLE_SYNTAX = "prompt_syntax:a1111"
NOISE_SCHEDULE = "noise_schedule"
# Names of limits: width x height in pixels, and the largest `clip_skip` of a checkpoint.
PIXELS, TEXT_ENCODER_LAYERS = "pixels", "text_encoder_layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Each need once, with the field that asks for it, relative to the request."""

    # Such as ("checkpoint:starter", "model").
    offers: tuple[tuple[str, str], ...]
    # Such as ("pixels", 262144, "width_px").
    amounts: tuple[tuple[str, int, str], ...]


def needs_of(request: GenerateRequest) -> Needs:
    """`request`: resolved, so that models are named by their ids and ControlNets are chosen."""
    offers: dict[str, str] = {}
    for offer, field in [*_models(request), *_others(request), *_young_fields(request, "")]:
        offers.setdefault(offer, field)
    return Needs(offers=tuple(offers.items()), amounts=tuple(_amounts(request)))


def needs_of_annotation(request: AnnotateRequest, *, field: str = "annotator") -> Needs:
    """`request`: resolved, so that the annotator is named by its id. `field`: the client's, that names the annotator.

    Without a size no pixels are known.
    """
    pixels = request.width_px * request.height_px
    return Needs(
        offers=((f"{ANNOTATOR}:{request.annotator}", field),),
        amounts=((PIXELS, pixels, "width_px"),) if pixels else (),
    )


def scheduler_need(scheduler: str) -> str:
    """Such as `scheduler:euler_a`, from any spelling. NotFound, field `scheduler`."""
    return f"{SCHEDULER}:{resolve(scheduler)[0]}"


def layers_limit(checkpoint: str) -> str:
    """The limit's name for the largest `clip_skip` of a checkpoint, which Model.text_encoder_layers announces."""
    return f"{TEXT_ENCODER_LAYERS}:{checkpoint}"


def _models(request: GenerateRequest) -> list[tuple[str, str]]:
    found = [(need(CHECKPOINT, request.model), "model")] if request.model else []
    found += [
        (need(CONTROLNET, control.controlnet), f"controls[{index}].controlnet")
        for index, control in enumerate(request.controls)
        if control.controlnet
    ]
    found += [(need(LORA, use.model), f"loras[{index}].model") for index, use in enumerate(request.loras)]
    found += [(need(LORA, tag.name), "prompt") for tag in parsed_prompts(request)["prompt"].loras]
    if request.vae:
        found.append((need(VAE, request.vae), "vae"))
    found += [(need(EMBEDDING, name), f"embeddings[{index}]") for index, name in enumerate(request.embeddings)]
    return found


def _others(request: GenerateRequest) -> list[tuple[str, str]]:
    found = [(scheduler_need(request.scheduler), "scheduler")] if request.scheduler else []
    scheduler, schedule = resolve(request.scheduler, request.noise_schedule)
    if not is_known_to_all(scheduler, schedule):
        found.append((f"{NOISE_SCHEDULE}:{schedule}", "noise_schedule"))
    if request.safety_checker not in ("", OFF):
        found.append((f"{SAFETY_CHECKER}:{request.safety_checker}", "safety_checker"))
    if request.precision:
        found.append((f"{PRECISION}:{request.precision}", "precision"))
    if field := _of_whole_syntax(request):
        found.append((WHOLE_SYNTAX, field))
    return found


def _of_whole_syntax(request: GenerateRequest) -> str:
    """The field that only a worker with A1111's whole syntax reads; empty for none."""
    for field, prompt in parsed_prompts(request).items():
        if prompt.has_changes or len(prompt.prompts) > 1:
            return field
    if request.prompt_syntax not in ("", STRICT):
        return "prompt_syntax"
    if request.emphasis not in ("", ORIGINAL):
        return "emphasis"
    return "sdxl_clip_skip" if request.HasField("sdxl_clip_skip") else ""


def _amounts(request: GenerateRequest) -> list[tuple[str, int, str]]:
    found = []
    if request.width_px and request.height_px:
        found.append((PIXELS, request.width_px * request.height_px, "width_px"))
    layer, field = max([(request.clip_skip, "clip_skip"), (request.sdxl_clip_skip, "sdxl_clip_skip")])
    if layer:
        found.append((layers_limit(request.model), layer, field))
    return found


# By message, the last field that every worker knows. One that is younger is a need where it is set.
ALWAYS_KNOWN = {"fanlight.diffusion.v1.GenerateRequest": 31, "fanlight.diffusion.v1.Control": 8}


def _young_fields(message: Message, path: str) -> Iterator[tuple[str, str]]:
    """The set fields that not every worker knows, as needs, and where they are."""
    name = message.DESCRIPTOR.full_name
    for field, value in message.ListFields():
        below = f"{path}.{field.name}" if path else field.name
        if field.number > ALWAYS_KNOWN.get(name, field.number):
            yield field_need(name, field.number), below
        if field.message_type is None or field.message_type.full_name not in ALWAYS_KNOWN:
            continue
        for index, each in enumerate(value):
            yield from _young_fields(each, f"{below}[{index}]")


def young_fields(message_name: str) -> list[str]:
    """As needs, the fields of a message that this side knows and an older worker may not."""
    known = ALWAYS_KNOWN.get(message_name)
    if known is None:
        return []
    fields = descriptor_pool.Default().FindMessageTypeByName(message_name).fields
    return [field_need(message_name, field.number) for field in fields if field.number > known]


# Counts up when requests change in a way that field numbers do not show.
REVISION = 2
_OURS = "fanlight."


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownField:
    """A field that this side's messages do not have."""

    # Path of the message that has it, such as `controls[0]`; empty for the request itself.
    path: str
    # Full name, such as `fanlight.diffusion.v1.Control`.
    message_name: str
    number: int

    @property
    def field(self) -> str:
        """As errors name it: `31`, or `controls[0].9`."""
        return f"{self.path}.{self.number}" if self.path else str(self.number)

    @property
    def need(self) -> str:
        """What a worker must offer to get it, such as `field:fanlight.diffusion.v1.Control:9`."""
        return field_need(self.message_name, self.number)


def field_need(message_name: str, number: int) -> str:
    """The need of a worker that knows this field of a message."""
    return f"field:{message_name}:{number}"


def contract_revision(*message_classes: type[Message]) -> ContractRevision:
    """The last known field of these messages and of all Fanlight messages nested in them, ordered by name."""
    known: dict[str, int] = {}
    waiting = [cast(Descriptor, each.DESCRIPTOR) for each in message_classes]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name in known:
            continue
        known[descriptor.full_name] = max((field.number for field in descriptor.fields), default=0)
        waiting += _ours_below(descriptor)
    messages = [KnownMessage(name=name, last_field=known[name]) for name in sorted(known)]
    return ContractRevision(revision=REVISION, messages=messages)


def _ours_below(descriptor: Descriptor) -> list[Descriptor]:
    nested = (field.message_type for field in descriptor.fields)
    return [each for each in nested if each is not None and each.full_name.startswith(_OURS)]


def unknown_fields(message: Message) -> list[UnknownField]:
    """The unknown fields of the message and of all messages nested in it, each once per message."""
    return list(_unknown(message, ""))


def _unknown(message: Message, path: str) -> Iterator[UnknownField]:
    name = message.DESCRIPTOR.full_name
    unknown = UnknownFieldSet(message)
    for number in sorted({unknown[index].field_number for index in range(len(unknown))}):
        yield UnknownField(path=path, message_name=name, number=number)
    for field, value in message.ListFields():
        if field.message_type is None or not field.message_type.full_name.startswith(_OURS):
            continue
        below = f"{path}.{field.name}" if path else field.name
        if isinstance(value, Message):
            yield from _unknown(value, below)
        else:
            for index, each in enumerate(value):
                yield from _unknown(each, f"{below}[{index}]")


def refuse_unknown_fields(message: Message) -> None:
    """InvalidField about the first field that this side does not know."""
    for unknown in _unknown(message, ""):
        raise InvalidField(
            f"field {unknown.number} of {unknown.message_name} is newer than this service, which knows revision "
            f"{REVISION} of the contract: leave it out, or update the service",
            field=unknown.field,
        )
