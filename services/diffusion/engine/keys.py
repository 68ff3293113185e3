"""Which pictures may share the UNet's batch. Pure."""

from dataclasses import dataclass

from services.diffusion.generation import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """Pictures with equal keys may be painted together; what else differs is kept per picture."""

    model: str
    width_px: int
    height_px: int
    controlnets: tuple[str, ...]
    is_guided: bool
    # Those that change the UNet.
    loras: tuple[tuple[str, float], ...] = ()
    # Set for a picture that shares with none.
    alone: int | None = None


def key_of(generation: Generation, *, number: int) -> BatchKey:
    """`number`: another one for every picture."""
    return BatchKey(
        model=generation.checkpoint.id,
        width_px=generation.width_px,
        height_px=generation.height_px,
        controlnets=tuple(control.controlnet.id for control in generation.controls),
        loras=tuple(sorted((use.entry.id, use.unet_weight) for use in generation.loras if use.unet_weight)),
        is_guided=generation.is_guided,
        alone=number if generation.alone or generation.strict else None,
    )
