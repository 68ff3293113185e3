"""The models that a service can name: what they are, where they are, what they are called and what they fit.

Reads JSON and file sizes, never weights. Loads no torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from services.diffusion.models.recipes import Config, Recipe, UnfitFolder, read_json

# Known families, by the width of their prompt embeddings.
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
    """What every model has."""

    id: str
    # A folder in diffusers' layout, or a single file.
    path: Path
    size_bytes: int
    # SPDX, from the manifest beside it; empty where there is none.
    license: str = ""
    # The request's name for a fetched model; empty for a local one.
    reference: str = ""
    # What is unusual about it, in a sentence; empty where nothing is.
    note: str = ""


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
    def is_inpainting(self) -> bool:
        """Its UNet was made for inpainting: it takes mask and masked image beside the latents, and needs them."""
        return self.unet_channels != self.shape.latent_channels

    @property
    def text_encoder_layers(self) -> int:
        """How many layers a prompt's states can be taken from, counted back from the last one, which is 1."""
        return min(text.layers for text in self.recipe.texts)

    @property
    def has_guidance_embedding(self) -> bool:
        """Its UNet was distilled to take the guidance scale as an input, as LCM checkpoints are."""
        return self.recipe.unet.get("time_cond_proj_dim") is not None

    @property
    def zeroes_empty_negative(self) -> bool:
        """Trained with zeros in place of an empty negative prompt (SDXL base)."""
        return bool(self.recipe.index.get("force_zeros_for_empty_prompt", False))

    @property
    def takes_aesthetic_score(self) -> bool:
        """A refiner: it takes an aesthetic score, and always starts from an image."""
        return bool(self.recipe.index.get("requires_aesthetics_score", False))


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetEntry(_Entry):
    """It fits checkpoints of the same shape."""

    config: Config = field(compare=False, repr=False)
    shape: Shape
    # Its tensors are a difference to those of the checkpoint that it is used with.
    is_difference: bool = False


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

    # Its vectors' width for each text encoder.
    widths: tuple[int, ...]
    # How many tokens it takes up in a prompt.
    vectors: int
    # The LoRA whose file has it, for whose images alone it counts; empty for a file of its own.
    bundled_in: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraEntry(_Entry):
    """It fits checkpoints of the same width."""

    # The width of the prompt embeddings that it was trained on; 0 where its file does not show it.
    cross_attention_dim: int
    # What it may be called beside its id.
    aliases: tuple[str, ...] = ()
    # Textual inversions in its file.
    bundled: tuple[EmbeddingEntry, ...] = ()


Entry = CheckpointEntry | ControlNetEntry | LoraEntry | VaeEntry | EmbeddingEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUse:
    """A LoRA and how strongly it is applied, on the UNet and on the text encoders."""

    entry: LoraEntry
    unet_weight: float = 1.0
    text_weight: float = 1.0


KINDS: Mapping[type, str] = {
    CheckpointEntry: "checkpoint",
    ControlNetEntry: "controlnet",
    LoraEntry: "lora",
    VaeEntry: "vae",
    EmbeddingEntry: "embedding",
}


def checkpoint_entry(path: Path, recipe: Recipe, size_bytes: int, *, is_ldm: bool = False) -> CheckpointEntry:
    """UnfitFolder where the parts of the recipe do not fit together."""
    unet, vae = recipe.unet, recipe.vae
    try:
        check_widths(vae["block_out_channels"])
        shape = shape_of(unet, 2 ** (len(vae["block_out_channels"]) - 1))
        if shape.latent_channels != vae["latent_channels"]:
            raise UnfitFolder(
                f"its UNet makes {shape.latent_channels} channels, its VAE takes {vae['latent_channels']}"
            )
        if unet["in_channels"] not in (shape.latent_channels, 2 * shape.latent_channels + 1):
            raise UnfitFolder(f"a UNet that takes {unet['in_channels']} channels is not supported")
        height, width = _pair(unet["sample_size"])
        check_counts([height * shape.latent_factor, width * shape.latent_factor], SIDE_LIMIT_PX)
        check_counts([text.config["hidden_size"] for text in recipe.texts], WIDTH_LIMIT)
        check_counts([text.layers for text in recipe.texts], LAYERS_LIMIT)
        if min(text.layers for text in recipe.texts) < 1:
            raise UnfitFolder("its text encoder has no layers")
    except (KeyError, TypeError, ValueError) as error:
        raise UnfitFolder("a config lacks what a Stable Diffusion has") from error
    return CheckpointEntry(
        id=checkpoint_id(path),
        path=path,
        recipe=recipe,
        is_ldm=is_ldm,
        shape=shape,
        width_px=width * shape.latent_factor,
        height_px=height * shape.latent_factor,
        size_bytes=size_bytes,
        license=license_of(path),
    )


def controlnet_entry(path: Path, config: Config, size_bytes: int) -> ControlNetEntry:
    try:
        shape = shape_of(config, 2 ** (len(config["conditioning_embedding_out_channels"]) - 1))
    except (KeyError, TypeError, ValueError) as error:
        raise UnfitFolder("its config lacks what a ControlNet has") from error
    return ControlNetEntry(
        id=controlnet_id(own_name(path)),
        path=path,
        config=config,
        shape=shape,
        size_bytes=size_bytes,
        license=license_of(path),
    )


def shape_of(config: Mapping[str, Any], latent_factor: int) -> Shape:
    """KeyError, TypeError or ValueError for what no such config has."""
    shape = Shape(
        latent_factor=latent_factor,
        # A ControlNet has no output of its own; it takes the latents as they are.
        latent_channels=int(config.get("out_channels", config["in_channels"])),
        cross_attention_dim=int(config["cross_attention_dim"]),
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=int(config["layers_per_block"]),
    )
    check_counts([shape.latent_factor, shape.latent_channels, shape.layers_per_block], LAYERS_LIMIT)
    check_counts([shape.cross_attention_dim], WIDTH_LIMIT)
    check_widths(shape.block_out_channels)
    return shape


# No model of these families comes near: what is beyond would overflow a report, or be built for hours.
LAYERS_LIMIT = 1_000
WIDTH_LIMIT = 65_536
SIDE_LIMIT_PX = 8_192


def check_counts(counts: Iterable[object], limit: int) -> None:
    """ValueError unless all are whole numbers from 1 to the limit."""
    for count in counts:
        if type(count) is not int or not 1 <= count <= limit:
            raise ValueError(f"{str(count)[:40]} is not 1 to {limit}")


def check_widths(widths: object) -> None:
    """TypeError or ValueError unless it is a list of blocks' widths."""
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= LAYERS_LIMIT:
        raise ValueError(f"{str(widths)[:40]} are not the widths of blocks")
    check_counts(widths, WIDTH_LIMIT)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def license_of(path: Path) -> str:
    """SPDX, from a MANIFEST.json beside the model; empty where there is none."""
    manifest = next((each / "MANIFEST.json" for each in path.parents[:2] if (each / "MANIFEST.json").is_file()), None)
    if manifest is None:
        return ""
    name = path.relative_to(manifest.parent).as_posix()
    try:
        files = read_json(manifest).get("files", [])
        own = [file for file in files if file["path"] == name or file["path"].startswith(f"{name}/")]
        return " AND ".join(sorted({file["license"] for file in own}))
    except (UnfitFolder, KeyError, TypeError, AttributeError):
        return ""


def _pair(size: int | list[int]) -> tuple[int, int]:
    """Height and width of diffusers' `sample_size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def fingerprint(path: Path, part: str) -> object:
    """Changes when the files of a part do: names, sizes and times. A file that was replaced is loaded again."""
    folder = path / part if part and (path / part).is_dir() else path
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    # Of a LoRA in a folder of adapters.
    files = files or sorted(folder.glob("*/adapter_model.safetensors"))
    try:
        return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    except OSError:
        return ()


# `name.safetensors [d14c016b]`, as A1111 writes it.
_HASH = re.compile(r"\s*\[[0-9a-fA-F]{6,64}\]$")
_ENDINGS = re.compile(r"\.(safetensors|ckpt|pt|pth|bin)$", re.IGNORECASE)
_PRECISION = re.compile(r"[_.-](fp16|bf16|fp32)$")
# What libraries call the weights of a folder with a config.
_WEIGHTS = frozenset({"diffusion_pytorch_model", "model", "pytorch_model"})
# Names that many files have; such a file is called by its folder.
_COMMON = _WEIGHTS | {"adapter_model", "learned_embeds", "pytorch_lora_weights"}
# What such names may end in: precision, kind of average, step of the training.
_COMMON_ENDING = re.compile(r"([_.-](fp16|bf16|fp32|non_ema|ema)|[_-]steps?[_-]?\d+)+$")
# `-00001-of-00002`, of a model in several files.
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Folders that are called alike in every model: the folder above says which one it is.
_COMMON_FOLDERS = frozenset({"unet", "vae", "text_encoder", "text_encoder_2", "controlnet", "lora", "snapshots"})
# Of a pipeline with several ControlNets.
_NUMBERED_CONTROLNET = re.compile(r"controlnet_\d+", re.IGNORECASE)
# Folders of many models: none of them is called so.
_COLLECTIONS = frozenset({
    "checkpoints", "diffusers", "diffusion_models", "embeddings", "loras", "lycoris", "models", "stable-diffusion",
    "textual_inversion", "vae-approx",
})  # fmt: skip
# Of the hub's cache, `models--ORG--NAME/snapshots/REVISION`.
_REVISION = re.compile(r"[0-9a-f]{40}")
_HUB_FOLDER = re.compile(r"^models--.*--")
_KIND_PREFIX = re.compile(r"^(lora|vae|controlnet|embedding)[-_]")
_CONTROLNET_MARKS = ("controlnet-", "controlnet_", "_sd15_", "_sd15s2_", "_sd21_", "_sd14_")
# The usual ones, by short id: author and repository, which is A1111's name for them too.
_REPOSITORIES = {
    "canny": "lllyasviel/control_v11p_sd15_canny",
    "depth": "lllyasviel/control_v11f1p_sd15_depth",
    "inpaint": "lllyasviel/control_v11p_sd15_inpaint",
    "ip2p": "lllyasviel/control_v11e_sd15_ip2p",
    "lineart": "lllyasviel/control_v11p_sd15_lineart",
    "lineart_anime": "lllyasviel/control_v11p_sd15s2_lineart_anime",
    "mlsd": "lllyasviel/control_v11p_sd15_mlsd",
    "normal": "lllyasviel/control_v11p_sd15_normalbae",
    "openpose": "lllyasviel/control_v11p_sd15_openpose",
    "qr": "DionTimmer/controlnet_qrcode",
    "scribble": "lllyasviel/control_v11p_sd15_scribble",
    "seg": "lllyasviel/control_v11p_sd15_seg",
    "shuffle": "lllyasviel/control_v11e_sd15_shuffle",
    "softedge": "lllyasviel/control_v11p_sd15_softedge",
    "tile": "lllyasviel/control_v11f1e_sd15_tile",
}

# Parts of ControlNets' names that differ from the short id.
_CONTROLNETS = {"normalbae": "normal", "qrcode": "qr", "qr_code": "qr", "v1p_sd15_qrcode": "qr"}


def plain(name: str) -> str:
    """A name from a request without hash and ending."""
    return _ENDINGS.sub("", _HASH.sub("", name.strip()))


def own_name(path: PurePath) -> str:
    """The file's or folder's name, without ending; the nearest folder's where many models have that name."""
    name = plain(path.name)
    is_file = name != path.name
    if not (is_common(name) if is_file else _is_common_folder(name)):
        return _HUB_FOLDER.sub("", name)
    folders = (folder.name for folder in path.parents if not _is_common_folder(folder.name))
    nearest = next(filter(None, folders), name)
    return name if is_file and nearest.lower() in _COLLECTIONS else _HUB_FOLDER.sub("", nearest)


def is_common(name: str) -> bool:
    """Whether many files have that name, without ending, so that it says nothing of the model."""
    return _COMMON_ENDING.sub("", name).lower() in _COMMON


def belongs_to_config(name: str) -> bool:
    """Whether a file of that name, without ending, is what the config.json beside it is about."""
    return _COMMON_ENDING.sub("", _SHARD.sub("", name)).lower() in _WEIGHTS


def _is_common_folder(name: str) -> bool:
    is_known = name.lower() in _COMMON_FOLDERS or any(
        each.fullmatch(name) for each in (_NUMBERED_CONTROLNET, _REVISION)
    )
    return is_common(name) or is_known


def checkpoint_id(path: PurePath) -> str:
    return own_name(path)


def controlnet_id(name: str) -> str:
    """`canny` of `controlnet-canny`, `lllyasviel/control_v11p_sd15_canny`, `control_v11p_sd15_canny [d14c016b]`."""
    short = _PRECISION.sub("", plain(name).rpartition("/")[2])
    for mark in _CONTROLNET_MARKS:
        _, found, rest = short.partition(mark)
        if found and rest:
            short = rest
            break
    return _CONTROLNETS.get(short, short)


def controlnet_aliases(short: str) -> list[str]:
    """Other names of the ControlNet of that id, which `controlnet_id` understands."""
    repository = _REPOSITORIES.get(short, "")
    names = [repository, repository.rpartition("/")[2]] if repository else []
    names += [name for name, meant in _CONTROLNETS.items() if meant == short]
    return [*names, *(f"{name}_fp16" for name in names[1:])]


def part_id(path: PurePath) -> str:
    """Of a LoRA, VAE or embedding."""
    return _KIND_PREFIX.sub("", own_name(path))
