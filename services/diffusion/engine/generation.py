"""One image to generate, with all options filled in. Knows no protobuf and no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from PIL import Image

from fanlight.contract import limits, masks
from fanlight.contract.prompt import ORIGINAL, STRICT, parse_prompt
from services.diffusion.canvas import Paste
from services.diffusion.images import Format
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, EmbeddingEntry, LoraUse, VaeEntry

# Which of SDXL's layers, counted from the last one, it was trained with.
SDXL_LAYER = 2


class Pipeline(StrEnum):
    TEXT2IMG = "text2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"
    CONTROLNET = "controlnet"
    CONTROLNET_IMG2IMG = "controlnet_img2img"
    CONTROLNET_INPAINT = "controlnet_inpaint"


class Safety(StrEnum):
    """What is done with an image that the safety checker finds unsafe."""

    # Images are not checked.
    OFF = "off"
    # It is flagged.
    FLAG = "flag"
    # It is flagged and blurred beyond recognition.
    BLUR = "blur"
    # It is flagged and replaced by a black image.
    BLOCK = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What img2img and inpaint start from."""

    # RGB, of the generated image's size.
    image: Image.Image = field(repr=False, compare=False)
    # The part of the steps that run on it, above 0 to 1; at 1 nothing of the image is left.
    strength: float
    # Grayscale, of the generated image's size; white is generated again, black stays, gray is generated in the last
    # steps. None: all is, as in img2img.
    mask: Image.Image | None = field(default=None, repr=False, compare=False)
    # What latents under the mask begin as: `noise`, `nothing`, or else what the image has there.
    fill: str = masks.ORIGINAL
    # What is done with the finished image; None: nothing.
    paste: Paste | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlInput:
    """A ControlNet, its control image, and how strongly it conditions when."""

    controlnet: ControlNetEntry
    # RGB, of the generated image's size.
    image: Image.Image = field(repr=False, compare=False)
    # Grayscale, of the generated image's size; pixels from 128 on are marked as missing for the net.
    mask: Image.Image | None = field(default=None, repr=False, compare=False)
    scale: float = 1.0
    # Parts of the steps, 0 <= start < end <= 1.
    start: float = 0.0
    end: float = 1.0
    # Which annotator made the image, and with what parameters, as JSON; empty where that is not known.
    annotator: str = ""
    annotator_parameters: str = ""
    # How its image was fitted; empty: as the generation's images.
    resize: str = ""
    # `balanced`, `prompt` or `control`; empty: `balanced`, or as the generation's guess mode says.
    mode: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Options have the names of the request's fields: parse/parser.py reads and writes them by these names.

    A field with a default may be unset in a request.
    """

    checkpoint: CheckpointEntry
    prompt: str = field(repr=False)
    negative_prompt: str = field(default="", repr=False)
    width_px: int
    height_px: int
    steps: int = limits.DEFAULT_STEPS
    guidance_scale: float = limits.DEFAULT_GUIDANCE_SCALE
    # A short name, as fanlight.contract.schedulers has it.
    scheduler: str
    seed: int
    # Empty: the scheduler's own.
    noise_schedule: str = ""
    eta: float = limits.DEFAULT_ETA
    # None: the seed's noise alone; the strength is 0 then.
    variation_seed: int | None = None
    variation_strength: float = 0.0
    start: Start | None = None
    controls: tuple[ControlInput, ...] = ()
    guess_mode: bool = False
    # None where nothing is masked.
    mask_blur: float | None = None
    only_masked: bool = False
    mask_padding: int | None = None
    mask_fill: str = ""
    mask_invert: bool = False
    mask_from_alpha: bool = False
    outpaint_left_px: int = 0
    outpaint_right_px: int = 0
    outpaint_top_px: int = 0
    outpaint_bottom_px: int = 0
    # How images were fitted to the size: crop, stretch or pad; empty without images.
    resize: str = ""
    # Those of the prompt's `<lora:name:weight>` are among them.
    loras: tuple[LoraUse, ...] = ()
    # None: the checkpoint's own.
    vae: VaeEntry | None = None
    # Those that a prompt names, each once.
    embeddings: tuple[EmbeddingEntry, ...] = ()
    clip_skip: int = limits.DEFAULT_CLIP_SKIP
    format: Format = Format.PNG
    # Of WebP and JPEG; WebP with 100 is lossless.
    quality: int = limits.DEFAULT_QUALITY
    safety_checker: Safety = Safety.OFF
    # How its prompts are read, and what their weights do: as fanlight.contract.prompt has them.
    prompt_syntax: str = STRICT
    emphasis: str = ORIGINAL
    # None: the layer that SDXL was trained with, which is 2.
    sdxl_clip_skip: int | None = None
    # What the UNet must compute in; empty takes any.
    precision: str = ""
    # sha256 of the encoded images that came with the request, by field.
    image_digests: tuple[tuple[str, str], ...] = ()
    preview_every_steps: int = 0
    # The same device gives the same bits every time.
    strict: bool = False
    # No other image may share its batch.
    alone: bool = False
    # What is done otherwise than the request may have meant, in sentences: the contract's, then this worker's.
    warnings: tuple[str, ...] = ()

    @property
    def is_guided(self) -> bool:
        """Classifier-free guidance doubles the batch; a scale of 1 and below means none, as in diffusers.

        A checkpoint that was distilled to take the scale as an input (LCM) does not need it.
        """
        return self.guidance_scale > 1 and not self.checkpoint.has_guidance_embedding

    @property
    def result_size_px(self) -> tuple[int, int]:
        """Another size than the generated one where a part of a larger image was generated."""
        paste = self.start.paste if self.start else None
        return paste.size_px if paste else (self.width_px, self.height_px)

    @property
    def vae_entry(self) -> CheckpointEntry | VaeEntry:
        """The model whose VAE it uses."""
        return self.vae or self.checkpoint

    @property
    def model(self) -> str:
        return self.checkpoint.id

    @property
    def pipeline(self) -> Pipeline:
        if self.start is None:
            return Pipeline.CONTROLNET if self.controls else Pipeline.TEXT2IMG
        if self.start.mask is None:
            return Pipeline.CONTROLNET_IMG2IMG if self.controls else Pipeline.IMG2IMG
        return Pipeline.CONTROLNET_INPAINT if self.controls else Pipeline.INPAINT

    @property
    def strength(self) -> float | None:
        """None where there is no image to start from."""
        return self.start.strength if self.start else None

    @property
    def text_layer(self) -> int:
        """Which of the text encoders' layers both prompts' states come from, counted from the end.

        1 is the one that the checkpoint was trained with. As in A1111 `clip_skip` counts for both prompts and not for
        SDXL, whose own option counts from the last layer: SDXL was trained with the one before, 2.
        """
        if self.is_sdxl:
            return (self.sdxl_clip_skip or SDXL_LAYER) - SDXL_LAYER + 1
        return self.clip_skip

    @property
    def is_sdxl(self) -> bool:
        return self.checkpoint.recipe.is_sdxl

    @property
    def predictions(self) -> int:
        """How often the model predicts noise in each step: for each prompt between ANDs, with guidance once more."""
        return len(parse_prompt(self.prompt, "prompt", self.prompt_syntax).prompts) + self.is_guided

    @property
    def rows(self) -> int:
        """How much of a batch it takes: 1, and with AND as many images without it have so many noise predictions."""
        return math.ceil(self.predictions / (1 + self.is_guided))


# A1111's titles of options, in the order in which it writes them.
A1111_OPTIONS: Mapping[str, str] = {
    "variation_seed": "Variation seed",
    "variation_strength": "Variation seed strength",
    "strength": "Denoising strength",
    "clip_skip": "Clip skip",
    "sdxl_clip_skip": "SDXL clip skip",
    "emphasis": "Emphasis",
    "eta": "Eta",
}

# By ControlNet, other defaults for unset options: how its text encoder was used in training.
DEFAULTS_WITH_CONTROLNET: Mapping[str, Mapping[str, int]] = {"lineart_anime": {"clip_skip": 2}}
