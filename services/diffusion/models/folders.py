"""Folders in diffusers' layout, read as far as their JSON and their files' sizes. Reads no weights, loads no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, Shape, VaeEntry
from services.diffusion.models.names import checkpoint_id, controlnet_id, part_id
from services.diffusion.models.recipes import Config, Recipe, UnfitFolder, from_folder, read_json

PIPELINE_CLASSES = frozenset(
    f"StableDiffusion{name}Pipeline"
    for name in ("", "ControlNet", "Img2Img", "Inpaint", "XL", "XLImg2Img", "XLInpaint", "XLControlNet")
)
_VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def is_checkpoint(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def class_of(folder: Path) -> str:
    """What the folder's own config.json says it is; empty where it has none."""
    file = folder / "config.json"
    return str(read_json(file).get("_class_name", "")) if file.is_file() else ""


def read_checkpoint(folder: Path) -> CheckpointEntry:
    """UnfitFolder where it is not a Stable Diffusion that this service can run."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINE_CLASSES:
        raise UnfitFolder(f"{pipeline} is not supported")
    return checkpoint_entry(folder, from_folder(folder), weight_bytes(folder))


def checkpoint_entry(path: Path, recipe: Recipe, size_bytes: int, *, is_ldm: bool = False) -> CheckpointEntry:
    """UnfitFolder where the parts of the recipe do not fit together."""
    unet, vae = recipe.unet, recipe.vae
    try:
        shape = shape_of(unet, 2 ** (len(vae["block_out_channels"]) - 1))
        if shape.latent_channels != vae["latent_channels"]:
            raise UnfitFolder(
                f"its UNet makes {shape.latent_channels} channels, its VAE takes {vae['latent_channels']}"
            )
        if unet["in_channels"] not in (shape.latent_channels, 2 * shape.latent_channels + 1):
            raise UnfitFolder(f"a UNet that takes {unet['in_channels']} channels is not supported")
        height, width = _pair(unet["sample_size"])
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


def read_controlnet(folder: Path) -> ControlNetEntry:
    """UnfitFolder where its config is not a ControlNet's."""
    return controlnet_entry(folder, read_json(folder / "config.json"), weight_bytes(folder))


def controlnet_entry(path: Path, config: Config, size_bytes: int) -> ControlNetEntry:
    try:
        shape = shape_of(config, 2 ** (len(config["conditioning_embedding_out_channels"]) - 1))
    except (KeyError, TypeError, ValueError) as error:
        raise UnfitFolder("its config lacks what a ControlNet has") from error
    return ControlNetEntry(
        id=controlnet_id(path.name),
        path=path,
        config=config,
        shape=shape,
        size_bytes=size_bytes,
        license=license_of(path),
    )


def is_vae(folder: Path) -> bool:
    return class_of(folder) in _VAE_CLASSES


def read_vae(folder: Path) -> VaeEntry:
    """UnfitFolder where its config is not a VAE's."""
    config = read_json(folder / "config.json")
    is_tiny = config["_class_name"] == "AutoencoderTiny"
    blocks = config.get("decoder_block_out_channels" if is_tiny else "block_out_channels")
    try:
        channels, factor = int(config.get("latent_channels", 4)), 2 ** (len(blocks) - 1) if blocks else 8
    except (TypeError, ValueError) as error:
        raise UnfitFolder("its config lacks what a VAE has") from error
    return VaeEntry(
        id=part_id(folder / "model"),
        path=folder,
        latent_factor=factor,
        latent_channels=channels,
        is_tiny=is_tiny,
        size_bytes=weight_bytes(folder),
        license=license_of(folder),
    )


def shape_of(config: Mapping[str, Any], latent_factor: int) -> Shape:
    return Shape(
        latent_factor=latent_factor,
        # A ControlNet has no output of its own; it takes the latents as they are.
        latent_channels=int(config.get("out_channels", config["in_channels"])),
        cross_attention_dim=int(config["cross_attention_dim"]),
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=int(config["layers_per_block"]),
    )


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def license_of(path: Path) -> str:
    """As a MANIFEST.json beside it says of it, or of the files in it."""
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
