"""One picture to paint, with everything filled in. Knows no protobuf, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from PIL import Image

from fanlight.contract import limits

if TYPE_CHECKING:
    from services.diffusion.models.entries import (
        CheckpointEntry,
        ControlNetEntry,
        EmbeddingEntry,
        LoraEntry,
        VaeEntry,
    )


class Pipeline(StrEnum):
    TEXT2IMG = "text2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"
    CONTROLNET = "controlnet"
    CONTROLNET_IMG2IMG = "controlnet_img2img"
    CONTROLNET_INPAINT = "controlnet_inpaint"


class Safety(StrEnum):
    """What becomes of a picture that the safety checker does not like."""

    # It is not checked.
    OFF = "off"
    # It is marked.
    FLAG = "flag"
    # It is marked and blurred until nothing can be made out.
    BLUR = "blur"
    # It is marked and black.
    BLOCK = "block"


class Format(StrEnum):
    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUse:
    """A LoRA and how strongly it is applied, on the UNet and on the text encoders."""

    entry: LoraEntry
    unet_weight: float = 1.0
    text_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What img2img and inpaint start from."""

    # RGB, of the picture's size.
    image: Image.Image = field(repr=False, compare=False)
    # How much of it is painted over, above 0 to 1.
    strength: float
    # Greyscale, of the picture's size; from 128 on is painted anew. None: all of it, as img2img does.
    mask: Image.Image | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    controlnet: ControlNetEntry
    # RGB, of the picture's size.
    image: Image.Image = field(repr=False, compare=False)
    # Greyscale, of the picture's size; from 128 on the net is told that the pixel is missing.
    mask: Image.Image | None = field(default=None, repr=False, compare=False)
    scale: float = 1.0
    # Parts of the steps, 0 <= start < end <= 1.
    start: float = 0.0
    end: float = 1.0
    # Which annotator made the image, and with what parameters, as JSON; empty where that is not known.
    annotator: str = ""
    annotator_parameters: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Options have the names of the request's fields: parse/options.py reads and wire.py writes them by these names.

    A field with a default may be left open in a request.
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
    controls: tuple[Control, ...] = ()
    guess_mode: bool = False
    # How the pictures came to the size: crop, stretch or pad.
    resize: str = ""
    # Those of the prompt's `<lora:name:weight>` too.
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
    # What the UNet must compute in; empty takes any.
    precision: str = ""
    # sha256 of the encoded pictures that came with the request, by field.
    pictures: tuple[tuple[str, str], ...] = ()
    preview_every_steps: int = 0
    # The same device gives the same bits every time.
    strict: bool = False
    # No other picture may share its batch.
    alone: bool = False

    @property
    def is_guided(self) -> bool:
        """Classifier-free guidance costs a second half of the batch; 1 and below means none, as in diffusers.

        A checkpoint that was distilled to be told the scale (LCM) has no use for it.
        """
        return self.guidance_scale > 1 and not self.checkpoint.is_told_guidance

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
        """Which of the text encoder's layers the prompt's states come from, counted from its end; 1 is the last."""
        return self.clip_skip


# By ControlNet, what a request that leaves it open gets: how its text encoder was used in training.
DEFAULTS_WITH_CONTROLNET: Mapping[str, Mapping[str, int]] = {"lineart_anime": {"clip_skip": 2}}

# What A1111 calls an option, in the order in which it writes them, and only where they are not the default.
A1111_OPTIONS: Mapping[str, str] = {
    "variation_seed": "Variation seed",
    "variation_strength": "Variation seed strength",
    "strength": "Denoising strength",
    "clip_skip": "Clip skip",
    "eta": "Eta",
}


def default_of(option: str) -> object:
    """None for one without a default."""
    own = Generation.__dataclass_fields__.get(option)
    return None if own is None or own.default is MISSING else own.default
