"""What this worker and a checkpoint can do: schedulers, precision, pipelines, sizes.

Announced to the gateway, and checked here by the same names. Loads no torch.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fanlight.contract import generation as contract
from fanlight.contract import needs
from fanlight.contract.masks import Sides, size_of_outpainted
from fanlight.contract.schedulers import NOISE_SCHEDULES, SCHEDULERS
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, InvalidField, TooLarge
from services.diffusion.engine.generation import Pipeline, Safety
from services.diffusion.models.entries import CheckpointEntry

# Kinds of needs that a worker meets; those that a model meets are checked with the model.
_KINDS = (needs.SCHEDULER, needs.NOISE_SCHEDULE, needs.SAFETY_CHECKER, needs.PRECISION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What the worker can do beside its models."""

    # The largest image, width x height.
    pixels_limit: int
    has_safety_checker: bool
    # What UNets compute in here: `float32`, `float16` or `bfloat16`.
    precision_of_device: Callable[[], str] = lambda: ""

    def offers(self) -> list[str]:
        """Such as `scheduler:euler_a`, in a fixed order."""
        modes = [mode for mode in Safety if mode is not Safety.OFF] if self.has_safety_checker else []
        precision = self.precision_of_device()
        return [
            *(f"{needs.SCHEDULER}:{name}" for name in SCHEDULERS),
            *(f"{needs.NOISE_SCHEDULE}:{name}" for name in NOISE_SCHEDULES),
            *(f"{needs.SAFETY_CHECKER}:{mode}" for mode in modes),
            *([f"{needs.PRECISION}:{precision}"] if precision else []),
            needs.WHOLE_SYNTAX,
        ]

    def limits(self) -> dict[str, int]:
        return {needs.PIXELS: self.pixels_limit}

    def check(self, resolved: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry) -> None:
        """FailedPrecondition and TooLarge name the field of what this worker lacks and another may have.

        `resolved`: the request with all defaults filled in.
        """
        needed = needs.needs_of(resolved)
        offers = frozenset(self.offers())
        for need, field in needed.offers:
            kind, _, value = need.partition(":")
            if kind in _KINDS and need not in offers:
                have = ", ".join(offer.partition(":")[2] for offer in self.offers() if offer.startswith(f"{kind}:"))
                raise FailedPrecondition(f"is {value}; this worker has {have or 'none'}", field=field)
        layers = needs.layers_limit(checkpoint.id)
        limits = {**self.limits(), layers: checkpoint.text_encoder_layers}
        for name, amount, field in needed.amounts:
            if amount <= limits.get(name, amount):
                continue
            if name == layers:
                raise FailedPrecondition(
                    f"is {amount}; the text encoder of {checkpoint.id} takes {limits[name]} at most", field=field
                )
            raise TooLarge(
                f"{resolved.width_px} x {resolved.height_px} are more than the {limits[name]} {name} that this worker"
                " generates",
                field=field,
            )


def pipelines_of(checkpoint: CheckpointEntry, *, has_controlnets: bool) -> list[Pipeline]:
    """Those that the checkpoint can run."""
    can: Collection[str] = tuple(Pipeline)
    if checkpoint.is_inpainting:
        can = contract.HAS_MASK
    elif checkpoint.takes_aesthetic_score:
        can = contract.STARTS_FROM_IMAGE
    without = frozenset[str]() if has_controlnets else contract.HAS_CONTROLS
    return [pipeline for pipeline in Pipeline if pipeline in can and pipeline not in without]


def pipeline_of(request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry) -> Pipeline:
    """InvalidField for one that the checkpoint cannot run."""
    pipeline = Pipeline(contract.pipeline_of(request))
    if pipeline not in (can := pipelines_of(checkpoint, has_controlnets=True)):
        raise InvalidField(
            f"is {pipeline}; the checkpoint {checkpoint.id} can do only {', '.join(can)}", field="pipeline"
        )
    return pipeline


def size_step_px(checkpoint: CheckpointEntry) -> int:
    """Sides must be multiples of this: whole latents. How often the UNet halves them does not matter."""
    return checkpoint.shape.latent_factor


def checked_size(width_px: int, height_px: int, checkpoint: CheckpointEntry, pixels_limit: int) -> tuple[int, int]:
    """InvalidField where it is not in whole latents; TooLarge above the limit."""
    step_px = size_step_px(checkpoint)
    for field, size_px in (("width_px", width_px), ("height_px", height_px)):
        if not size_px or size_px % step_px:
            raise InvalidField(f"is {size_px}; must be a multiple of {step_px}, or both 0", field=field)
    if width_px * height_px > pixels_limit:
        raise TooLarge(
            f"{width_px} x {height_px} are more than the {pixels_limit} pixels generated here", field="width_px"
        )
    return width_px, height_px


def size_of_image(
    size_px: tuple[int, int], sides: Sides, checkpoint: CheckpointEntry, pixels_limit: int
) -> tuple[int, int]:
    """The size that an input image implies, whichever worker generates it. TooLarge above this worker's limit."""
    implied_px = size_of_outpainted(size_px, sides, size_step_px(checkpoint))
    return checked_size(*implied_px, checkpoint, pixels_limit)
