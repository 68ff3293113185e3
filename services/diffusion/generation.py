"""One picture to paint, with everything filled in. Knows no protobuf, no torch."""

from dataclasses import dataclass, field

from PIL import Image

from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    controlnet: ControlNetEntry
    # RGB, of the picture's size.
    image: Image.Image = field(repr=False, compare=False)
    scale: float = 1.0
    # Parts of the steps, 0 <= start < end <= 1.
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    checkpoint: CheckpointEntry
    prompt: str = field(repr=False)
    negative_prompt: str = field(default="", repr=False)
    width_px: int
    height_px: int
    steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    controls: tuple[Control, ...] = ()
    preview_every_steps: int = 0
    # No other picture may share its batch.
    alone: bool = False

    @property
    def is_guided(self) -> bool:
        """Classifier-free guidance costs a second half of the batch; 1 and below means none, as in diffusers."""
        return self.guidance_scale > 1
