"""What the JSON files in a model's folder tell about it. Reads no weights and loads no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIPELINE_CLASSES = frozenset({"StableDiffusionPipeline", "StableDiffusionControlNetPipeline"})


class UnfitFolder(Exception):
    """A folder that looks like a model and is none that can be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a ControlNet must have in common with the checkpoint that it conditions."""

    latent_factor: int
    latent_channels: int
    cross_attention_dim: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    down_block_types: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    id: str
    folder: Path
    shape: Shape
    # The size it was trained for.
    width_px: int
    height_px: int
    size_bytes: int
    # SPDX, from the manifest beside it; empty where there is none.
    licence: str = ""
    # `sd1`, `sd2`, `sdxl`, `refiner`; empty for a family of its own.
    base: str = ""
    # What its UNet takes: the latents' channels, or 9 for one made for inpainting.
    unet_channels: int = 4
    # Trained with zeros in place of an empty negative prompt (SDXL base).
    zeroes_empty_negative: bool = False
    # A refiner: it looks at a score of beauty, and only goes on from a picture.
    wants_aesthetic_score: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetEntry:
    id: str
    folder: Path
    shape: Shape
    size_bytes: int
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraEntry:
    id: str
    file: Path
    # As a checkpoint's `base`, or its id for a family of its own; empty where the file does not tell.
    base: str
    size_bytes: int
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeEntry:
    id: str
    # A folder in diffusers' layout or a single file.
    path: Path
    latent_factor: int
    latent_channels: int
    size_bytes: int
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingEntry:
    """A textual inversion: prompts name it by its id."""

    id: str
    file: Path
    # Of its vectors, one for each text encoder that it is for.
    widths: tuple[int, ...]
    # How many tokens it takes up in a prompt.
    vectors: int
    size_bytes: int
    licence: str = ""


def is_checkpoint(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def is_controlnet(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("_class_name") == "ControlNetModel"


def read_checkpoint(folder: Path) -> CheckpointEntry:
    """UnfitFolder where it is not a Stable Diffusion that this service can run."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINE_CLASSES:
        raise UnfitFolder(f"{pipeline} is not supported")
    unet, vae = read_json(folder / "unet" / "config.json"), read_json(folder / "vae" / "config.json")
    try:
        shape = _shape(unet, 2 ** (len(vae["block_out_channels"]) - 1))
        if shape.latent_channels != vae["latent_channels"]:
            raise UnfitFolder(
                f"its UNet takes {shape.latent_channels} channels, its VAE makes {vae['latent_channels']}"
            )
        height, width = _pair(unet["sample_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnfitFolder("a config lacks what a Stable Diffusion has") from error
    return CheckpointEntry(
        id=checkpoint_id(folder),
        folder=folder,
        shape=shape,
        width_px=width * shape.latent_factor,
        height_px=height * shape.latent_factor,
        size_bytes=_weight_bytes(folder),
        licence=_licence(folder),
    )


def read_controlnet(folder: Path) -> ControlNetEntry:
    """UnfitFolder where its config is not a ControlNet's."""
    config = read_json(folder / "config.json")
    try:
        shape = _shape(config, 2 ** (len(config["conditioning_embedding_out_channels"]) - 1))
    except (KeyError, TypeError, ValueError) as error:
        raise UnfitFolder("its config lacks what a ControlNet has") from error
    return ControlNetEntry(
        id=controlnet_id(folder.name),
        folder=folder,
        shape=shape,
        size_bytes=_weight_bytes(folder),
        licence=_licence(folder),
    )


def checkpoint_id(folder: Path) -> str:
    """The folder's name; a folder that is only called `model` goes by the one it lies in."""
    return folder.parent.name if folder.name == "model" else folder.name


def controlnet_id(name: str) -> str:
    """`canny` of `controlnet-canny`, `control_v11p_sd15_canny` and `sd-controlnet-canny`; else the name itself."""
    for mark in ("controlnet-", "_sd15_", "_sd15s2_", "_sd21_"):
        _, found, short = name.partition(mark)
        if found and short:
            return short
    return name


def read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UnfitFolder(f"{file.parent.name}/{file.name} cannot be read") from error
    if not isinstance(content, dict):
        raise UnfitFolder(f"{file.parent.name}/{file.name} is not an object")
    return content


def _shape(config: Mapping[str, Any], latent_factor: int) -> Shape:
    return Shape(
        latent_factor=latent_factor,
        latent_channels=int(config["in_channels"]),
        cross_attention_dim=int(config["cross_attention_dim"]),
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=int(config["layers_per_block"]),
        down_block_types=tuple(config["down_block_types"]),
    )


def _pair(size: int | list[int]) -> tuple[int, int]:
    """Height and width of diffusers' `sample_size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _licence(folder: Path) -> str:
    """As the starter model's MANIFEST.json, one folder up, says of the files in this one."""
    manifest = folder.parent / "MANIFEST.json"
    if not manifest.is_file():
        return ""
    try:
        files = read_json(manifest).get("files", [])
        own = [file for file in files if file["path"].startswith(f"{folder.name}/")]
        return " AND ".join(sorted({file["licence"] for file in own}))
    except (UnfitFolder, KeyError, TypeError, AttributeError):
        return ""
