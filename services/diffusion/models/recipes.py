"""The configs of a checkpoint's parts: from its own folder, or for a single file those shipped here.

Reads no weights and loads no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

CONFIGS = Path(__file__).parent / "configs"
MERGES = CONFIGS / "merges.txt"
# SDXL's pipelines have these two.
TEXT_ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
# transformers' default.
CLIP_TEXT_LAYERS = 12
# Configs of real models have some kilobytes; a tokenizer's vocabulary is not read here.
CONFIG_LIMIT_BYTES = 4 * 1024 * 1024
Config = Mapping[str, Any]


class UnfitFolder(Exception):
    """A model that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """One text encoder: the names of its part and of its tokenizer, and its config."""

    part: str
    tokenizer: str
    config: Config
    # Of the shipped tokenizer, which is CLIP's.
    pad_token: str = "<|endoftext|>"

    @property
    def layers(self) -> int:
        """ValueError or TypeError where the config has no number there."""
        return int(self.config.get("num_hidden_layers") or CLIP_TEXT_LAYERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    # model_index.json.
    index: Config
    unet: Config
    vae: Config
    texts: tuple[TextRecipe, ...]
    scheduler: Config = field(default_factory=dict)
    # The folder of the tokenizers; None: the shipped one.
    folder: Path | None = None

    @property
    def is_sdxl(self) -> bool:
        """SDXL or its refiner, which take the image's size as an input."""
        return bool(self.unet.get("addition_embed_type") == "text_time")

    @property
    def base(self) -> str:
        """`sd1`, `sd2`, `sdxl`, `refiner`; empty for a family of its own."""
        for name in ("sd1", "sd2", "sdxl", "refiner"):
            known = shipped(name).unet
            if all(self.unet.get(key) == known[key] for key in ("block_out_channels", "cross_attention_dim")):
                return name
        return ""


@cache
def shipped(name: str) -> Recipe:
    """`sd1`, `sd2`, `sdxl` or `refiner`."""
    configs = json.loads((CONFIGS / f"{name}.json").read_bytes())
    texts = [
        TextRecipe(part=part, tokenizer=tokenizer, config=configs[part], pad_token=configs[tokenizer]["pad_token"])
        for part, tokenizer in TEXT_ENCODERS
        if part in configs
    ]
    return Recipe(
        index=configs["model_index"],
        unet=configs["unet"],
        vae=configs["vae"],
        texts=tuple(texts),
        scheduler=configs["scheduler"],
    )


def for_file(name: str, *, unet_channels: int, prediction_type: str, is_small: bool) -> Recipe:
    """The shipped recipe, changed for a single file. `is_small`: a model of 512 pixels in a family that has more."""
    recipe = shipped(name)
    unet = {**recipe.unet, "in_channels": unet_channels}
    if is_small:
        unet["sample_size"] = 64
    scheduler = {**recipe.scheduler, "prediction_type": prediction_type or recipe.scheduler["prediction_type"]}
    return replace(recipe, unet=unet, scheduler=scheduler)


def from_folder(folder: Path) -> Recipe:
    """UnfitFolder where one of its files cannot be read."""
    texts = [
        TextRecipe(part=part, tokenizer=tokenizer, config=read_json(folder / part / "config.json"))
        for part, tokenizer in TEXT_ENCODERS
        if (folder / part).is_dir()
    ]
    if not texts:
        raise UnfitFolder("it has no text encoder")
    return Recipe(
        index=read_json(folder / "model_index.json"),
        unet=read_json(folder / "unet" / "config.json"),
        vae=read_json(folder / "vae" / "config.json"),
        texts=tuple(texts),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        folder=folder,
    )


def read_json(file: Path) -> Config:
    """The object in the file. UnfitFolder for anything else; never waits, as a pipe would make it."""
    where = f"{file.parent.name}/{file.name}"
    try:
        if not file.is_file():
            raise UnfitFolder(f"{where} is missing")
        if file.stat().st_size > CONFIG_LIMIT_BYTES:
            raise UnfitFolder(f"{where} has more than {CONFIG_LIMIT_BYTES} bytes")
        content = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UnfitFolder(f"{where} cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise UnfitFolder(f"{where} is not an object")
    return content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")
