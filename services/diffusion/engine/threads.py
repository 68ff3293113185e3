"""How many threads torch computes with on a CPU. For the device thread, whose own number it sets."""

import torch

from services.diffusion.generation import Generation
from services.diffusion.models.loading import Checkpoint

# Below so many weights times latent pixels an evaluation is too short to share: measured on two cores, a second thread
# saves nothing for 5 million weights on 16 x 16 latents, and beside other work it costs a multiple.
_WORTH_SHARING = 2e10


class Threads:
    def __init__(self, count: int) -> None:
        """`count` 0: one for small work, torch's default, which is one a core, for the rest."""
        self._wanted = count
        self._most = torch.get_num_threads()

    def suit(self, generation: Generation, checkpoint: Checkpoint) -> None:
        count = self._wanted or (self._most if _work(generation, checkpoint) >= _WORTH_SHARING else 1)
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


def _work(generation: Generation, checkpoint: Checkpoint) -> float:
    pixels = generation.width_px * generation.height_px / checkpoint.entry.shape.latent_factor**2
    weights: int = checkpoint.weights
    return pixels * weights
