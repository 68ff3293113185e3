"""The sizes and scores that SDXL looks at beside the prompt, as in Podell et al. 2023 and diffusers' pipelines."""

from torch import Tensor, tensor

from services.diffusion.generation import Generation
from services.diffusion.models.loading import Checkpoint

# What diffusers' pipelines fill in for the refiner.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


def time_ids(checkpoint: Checkpoint, generation: Generation, *, is_wanted: bool) -> Tensor:
    """(1, 6), or (1, 5) for a refiner: the picture's size, an uncropped corner, then that size again or a score."""
    size = [generation.height_px, generation.width_px]
    if checkpoint.entry.wants_aesthetic_score:
        ids = [*size, 0, 0, AESTHETIC_SCORE if is_wanted else NEGATIVE_AESTHETIC_SCORE]
    else:
        ids = [*size, 0, 0, *size]
    return tensor([ids], dtype=checkpoint.dtype, device=checkpoint.device)
