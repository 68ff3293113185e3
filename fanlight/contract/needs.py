"""What a worker must offer for a resolved request, in the names that workers announce it under.

`Capabilities.offers` holds offers such as `scheduler:euler_a`, `Capabilities.limits` limits such as `pixels`. A worker
that announces no limit of a name has no bound.
"""

from dataclasses import dataclass

from fanlight.contract.generation import OFF
from fanlight.contract.names import need
from fanlight.contract.prompt import read_prompt
from fanlight.contract.schedulers import resolve
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest

# Kinds of models, as in diffusion.v1.Model.
CHECKPOINT, CONTROLNET, LORA, VAE, EMBEDDING = "checkpoint", "controlnet", "lora", "vae", "embedding"
# Kinds of other offers.
SCHEDULER, SAFETY_CHECKER, PRECISION = "scheduler", "safety_checker", "precision"
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
    for offer, field in [*_models(request), *_others(request)]:
        offers.setdefault(offer, field)
    return Needs(offers=tuple(offers.items()), amounts=tuple(_amounts(request)))


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
    found += [(need(LORA, tag.name), "prompt") for tag in read_prompt(request.prompt, "prompt").loras]
    if request.vae:
        found.append((need(VAE, request.vae), "vae"))
    found += [(need(EMBEDDING, name), f"embeddings[{index}]") for index, name in enumerate(request.embeddings)]
    return found


def _others(request: GenerateRequest) -> list[tuple[str, str]]:
    found = [(scheduler_need(request.scheduler), "scheduler")] if request.scheduler else []
    if request.safety_checker not in ("", OFF):
        found.append((f"{SAFETY_CHECKER}:{request.safety_checker}", "safety_checker"))
    if request.precision:
        found.append((f"{PRECISION}:{request.precision}", "precision"))
    return found


def _amounts(request: GenerateRequest) -> list[tuple[str, int, str]]:
    found = []
    if request.width_px and request.height_px:
        found.append((PIXELS, request.width_px * request.height_px, "width_px"))
    if request.HasField("clip_skip"):
        found.append((layers_limit(request.model), request.clip_skip, "clip_skip"))
    return found
