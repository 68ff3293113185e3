"""What this worker can do beside its models: announced to the gateway, and checked here by the same names."""

from collections.abc import Callable
from dataclasses import dataclass

from fanlight.contract import needs
from fanlight.contract.schedulers import SCHEDULERS
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, TooLarge
from services.diffusion.generation import Safety
from services.diffusion.models.entries import CheckpointEntry

# What a model offers is checked where it is found by its name.
_KINDS = (needs.SCHEDULER, needs.SAFETY_CHECKER, needs.PRECISION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    # The largest image, width x height.
    pixels_limit: int
    has_safety_checker: bool
    # `float32`, `float16` or `bfloat16`: what UNets compute in here.
    precision_of_device: Callable[[], str] = lambda: ""

    def offers(self) -> list[str]:
        """Such as `scheduler:euler_a`, in a fixed order."""
        modes = [mode for mode in Safety if mode is not Safety.OFF] if self.has_safety_checker else []
        precision = self.precision_of_device()
        return [
            *(f"{needs.SCHEDULER}:{name}" for name in SCHEDULERS),
            *(f"{needs.SAFETY_CHECKER}:{mode}" for mode in modes),
            *([f"{needs.PRECISION}:{precision}"] if precision else []),
        ]

    def limits(self) -> dict[str, int]:
        return {needs.PIXELS: self.pixels_limit}

    def check(self, resolved: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry) -> None:
        """FailedPrecondition and TooLarge name the field of what this worker lacks and another may have.

        `resolved`: the request with everything filled in.
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
