"""The configs of a checkpoint's parts: from its own folder, or for a single file those shipped here.

Reads no weights and loads no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from services.kernel.files import StrangeFile, read_limited

CONFIGS = Path(__file__).parent / "configs"
MERGES = CONFIGS / "merges.txt"
# SDXL's pipelines have these two.
TEXT_ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
# transformers' default.
CLIP_TEXT_LAYERS = 12
# Configs of real models have some kilobytes; a tokenizer's vocabulary is not read here.
CONFIG_LIMIT_BYTES = 4 * 1024 * 1024
# What a UNet may predict.
PREDICTIONS = frozenset({"epsilon", "v_prediction", "sample"})
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
    # False for a single file without a VAE: requests must name one.
    has_vae: bool = True
    # What is odd about its file, as whole sentences; the images are made nonetheless.
    notes: tuple[str, ...] = ()

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


def changed(recipe: Recipe, *, unet: Config | None = None, vae: Config | None = None, **fields: Any) -> Recipe:
    """A recipe with other values in its configs. `fields`: of the recipe, as they are to be."""
    return replace(recipe, unet={**recipe.unet, **(unet or {})}, vae={**recipe.vae, **(vae or {})}, **fields)


def from_folder(folder: Path) -> Recipe:
    """UnfitFolder where one of its files cannot be read."""
    texts = [
        TextRecipe(part=part, tokenizer=tokenizer, config=read_json(folder / part / "config.json"))
        for part, tokenizer in TEXT_ENCODERS
        if (folder / part).is_dir()
    ]
    if not texts:
        raise UnfitFolder("it has no text encoder")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    _check_scheduler(scheduler)
    return Recipe(
        index=read_json(folder / "model_index.json"),
        unet=read_json(folder / "unet" / "config.json"),
        vae=read_json(folder / "vae" / "config.json"),
        texts=tuple(texts),
        scheduler=scheduler,
        folder=folder,
    )


def _check_scheduler(scheduler: Config) -> None:
    """UnfitFolder for what a model was trained to predict that no scheduler here can follow."""
    if (name := str(scheduler.get("_class_name", ""))).startswith("FlowMatch"):
        raise UnfitFolder(f"its scheduler is {name[:80]}: flow matching is not supported")
    predicted = scheduler.get("prediction_type")
    if isinstance(predicted, str) and predicted not in PREDICTIONS:
        raise UnfitFolder(f"its scheduler's prediction_type is {predicted[:40]!r}, which is not supported")


def read_json(file: Path) -> Config:
    """The object in the file. UnfitFolder for anything else; never waits, as a pipe would make it."""
    where = f"{file.parent.name}/{file.name}"
    try:
        content = json.loads(read_limited(file, CONFIG_LIMIT_BYTES), parse_constant=_constant)
    except StrangeFile as error:
        raise UnfitFolder(f"{file.parent.name}/{error}") from error
    except FileNotFoundError as error:
        raise UnfitFolder(f"{where} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnfitFolder(f"{where} cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise UnfitFolder(f"{where} is not an object")
    return content


def _constant(text: str) -> float:
    """diffusers writes infinities, as in `lambda_min_clipped` of schedulers; NaN means nothing."""
    if text == "NaN":
        raise ValueError("NaN is not a number")
    return float(text)
