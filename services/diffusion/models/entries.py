"""The models that a service can name: what they are, where they lie and what they fit. Reads nothing."""

from dataclasses import dataclass, field
from pathlib import Path

from services.diffusion.models.recipes import Config, Recipe

# Families that everybody knows, by the width of their prompt embeddings.
FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "refiner"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a ControlNet must have in common with the checkpoint that it conditions."""

    latent_factor: int
    latent_channels: int
    cross_attention_dim: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What is told of every model."""

    id: str
    # A folder in diffusers' layout, or a single file.
    path: Path
    size_bytes: int
    # SPDX, from the manifest beside it; empty where there is none.
    license: str = ""
    # What a request named that was fetched for it; empty for what lies on this machine.
    reference: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry(_Entry):
    """Its path may also be a folder of the parts of a single file in the LDM layout."""

    recipe: Recipe = field(compare=False, repr=False)
    is_ldm: bool = False
    shape: Shape
    # The size it was trained for.
    width_px: int
    height_px: int

    @property
    def base(self) -> str:
        """`sd1`, `sd2`, `sdxl`, `refiner`; empty for a family of its own."""
        return self.recipe.base

    @property
    def unet_channels(self) -> int:
        """What its UNet takes: the latents' channels, or 9 for one made for inpainting."""
        return int(self.recipe.unet["in_channels"])

    @property
    def text_encoder_layers(self) -> int:
        """From how far before the end a prompt's states can come: 1 is the layer that it was trained with."""
        before_last = 1 if self.recipe.looks_at_sizes else 0
        return min(text.layers for text in self.recipe.texts) - before_last

    @property
    def is_told_guidance(self) -> bool:
        """Its UNet was distilled to take the guidance scale itself, as LCM checkpoints are."""
        return self.recipe.unet.get("time_cond_proj_dim") is not None

    @property
    def zeroes_empty_negative(self) -> bool:
        """Trained with zeros in place of an empty negative prompt (SDXL base)."""
        return bool(self.recipe.index.get("force_zeros_for_empty_prompt", False))

    @property
    def wants_aesthetic_score(self) -> bool:
        """A refiner: it looks at a score of beauty, and only goes on from a picture."""
        return bool(self.recipe.index.get("requires_aesthetics_score", False))


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetEntry(_Entry):
    config: Config = field(compare=False, repr=False)
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraEntry(_Entry):
    # The width of the prompt embeddings that it was trained on; 0 where it does not tell.
    cross_attention_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeEntry(_Entry):
    """A single file may be in either layout's names."""

    latent_factor: int
    latent_channels: int
    # A TAESD: small and rough, for previews.
    is_tiny: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingEntry(_Entry):
    """A textual inversion: prompts name it by its id."""

    # Of its vectors, one for each text encoder that it is for; none for a pickle, which is read when it is used.
    widths: tuple[int, ...]
    # How many tokens it takes up in a prompt; 0 for a pickle.
    vectors: int


Entry = CheckpointEntry | ControlNetEntry | LoraEntry | VaeEntry | EmbeddingEntry
