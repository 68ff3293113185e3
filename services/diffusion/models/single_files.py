"""Single files of people's model folders: which model each is, told from its header. Reads no weights, loads no torch.

A checkpoint of no known shape needs its configs and tokenizer beside it, in a folder `NAME.config` as diffusers has it.
"""

import re
from pathlib import Path

from services.diffusion.models.entries import (
    CheckpointEntry,
    ControlNetEntry,
    EmbeddingEntry,
    Entry,
    LoraEntry,
    VaeEntry,
)
from services.diffusion.models.folders import checkpoint_entry, controlnet_entry, license_of
from services.diffusion.models.headers import LDM_FIRST, LDM_UNET, Header, Kind, kind_of, read_header
from services.diffusion.models.names import part_id
from services.diffusion.models.recipes import Config, Recipe, UnfitFolder, for_file, from_folder, shipped

# Larger pickles are not textual inversions.
EMBEDDING_LIMIT_BYTES = 16 * 1024 * 1024
EMBEDDING_PICKLES = frozenset({".pt", ".bin"})

# The first layer's width and the width of the prompt embeddings.
_BASES = {(320, 768): "sd1", (320, 1024): "sd2", (320, 2048): "sdxl", (384, 1280): "refiner"}
_CONTROL_BASES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_TO_KEY = "attn2.to_k.weight"
# What people call the models of SD 2 that were trained at 512 pixels and predict the noise.
_SMALL = re.compile(r"(512|base)", re.IGNORECASE)
_LORA_INPUT = re.compile(r"attn2[._](?:processor[._])?to_k(?:_lora)?\.(?:lora_down|lora_A|down|lora\.down|hada_w1_b)")
# Nets that condition with their residuals' mean over the picture.
_POOLING = "shuffle"


def read_file(path: Path) -> Entry | None:
    """Of a file, or a folder of files that are one; None for what this service does not use.

    UnfitFolder for a damaged or unsupported model.
    """
    header = read_header(path)
    try:
        return _told(path, header, kind_of(header))
    except (IndexError, StopIteration) as error:
        raise UnfitFolder(f"{path.name} has the names of a model and shapes of none") from error


def _told(path: Path, header: Header, kind: Kind | None) -> Entry | None:
    if kind is Kind.CHECKPOINT:
        return _checkpoint(path, header)
    if kind is Kind.CONTROLNET:
        return _controlnet(path, header)
    if kind is Kind.LORA:
        return _lora(path, header)
    if kind is Kind.VAE:
        return _vae(path, header)
    return _embedding(path, header) if kind is Kind.EMBEDDING else None


def read_parts(folder: Path) -> CheckpointEntry | None:
    """A folder of the parts of one checkpoint, as a store of weights makes them; None where it is none."""
    entry = read_file(folder) if (folder / "unet.safetensors").is_file() else None
    return entry if isinstance(entry, CheckpointEntry) else None


def read_embedding_pickle(path: Path) -> EmbeddingEntry | None:
    """Told from its name alone; what is in it is looked at when it is used."""
    size_bytes = path.stat().st_size
    if path.suffix not in EMBEDDING_PICKLES or size_bytes > EMBEDDING_LIMIT_BYTES:
        return None
    return EmbeddingEntry(id=part_id(path), path=path, widths=(), vectors=0, size_bytes=size_bytes)


def _checkpoint(path: Path, header: Header) -> CheckpointEntry:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    size_bytes = sum(file.stat().st_size for file in files)
    return checkpoint_entry(path, _recipe(path, header), size_bytes, is_ldm=True)


def _recipe(path: Path, header: Header) -> Recipe:
    beside = path.with_name(f"{path.stem if path.is_file() else path.name}.config")
    if beside.is_dir():
        return from_folder(beside)
    width, channels = header.shapes[LDM_FIRST][0], header.shapes[LDM_FIRST][1]
    base = _BASES.get((width, _context(header)))
    if base is None:
        raise UnfitFolder(f"its shapes are those of no known model; {beside.name}/ could hold its configs")
    prediction_type = _prediction_type(path, header, base)
    is_small = base == "sd2" and prediction_type == "epsilon"
    return for_file(base, unet_channels=channels, prediction_type=prediction_type, is_small=is_small)


def _context(header: Header) -> int:
    names = {name: shape for name, shape in header.shapes.items() if name.startswith(LDM_UNET)}
    return Header(shapes=names).width(_TO_KEY)


def _prediction_type(path: Path, header: Header, base: str) -> str:
    """As its metadata, its tensors, or a .yaml beside it say; SD 2 tells it by its name alone, as diffusers' do."""
    told = header.metadata.get("modelspec.prediction_type", "")
    if told in ("v", "v_prediction") or "v_pred" in header.shapes:
        return "v_prediction"
    if told == "epsilon":
        return "epsilon"
    sidecar = path.with_suffix(".yaml")
    if sidecar.is_file():
        text = sidecar.read_text(errors="replace")
        return "v_prediction" if re.search(r'parameterization:\s*"?v"?\s', text) else "epsilon"
    if base == "sd2":
        is_inpainting = header.shapes[LDM_FIRST][1] != shipped(base).unet["in_channels"]
        return "epsilon" if is_inpainting or _SMALL.search(path.stem) else "v_prediction"
    return ""


def _controlnet(path: Path, header: Header) -> ControlNetEntry:
    base = _CONTROL_BASES.get(header.width(_TO_KEY))
    if base is None:
        raise UnfitFolder("its shapes are those of no known ControlNet")
    return controlnet_entry(path, control_config(base, is_pooling=_POOLING in path.stem), path.stat().st_size)


def control_config(base: str, *, is_pooling: bool) -> Config:
    """A ControlNet is a copy of its base's UNet."""
    unet = shipped(base).unet
    shared = {key: value for key, value in unet.items() if key not in _NOT_CONTROL}
    return {
        **shared,
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "global_pool_conditions": is_pooling,
    }


_NOT_CONTROL = frozenset({"_class_name", "center_input_sample", "out_channels", "sample_size", "up_block_types"})


def _lora(path: Path, header: Header) -> LoraEntry:
    widths = [shape[1] for name, shape in header.shapes.items() if _LORA_INPUT.search(name) and len(shape) > 1]
    return LoraEntry(
        id=part_id(path),
        path=path,
        cross_attention_dim=widths[0] if widths else 0,
        size_bytes=path.stat().st_size,
        license=license_of(path),
    )


def _vae(path: Path, header: Header) -> VaeEntry:
    """The latents' channels from the decoder's first layer, their factor from how many blocks it has."""
    is_tiny = any(name.endswith("decoder.layers.0.weight") for name in header.shapes)
    blocks = {found[1] for name in header.shapes if (found := re.search(r"decoder\.(?:up|up_blocks)\.(\d+)\.", name))}
    first = "decoder.layers.0.weight" if is_tiny else "decoder.conv_in.weight"
    channels = next(shape[1] for name, shape in header.shapes.items() if name.endswith(first))
    return VaeEntry(
        id=part_id(path),
        path=path,
        latent_factor=8 if is_tiny else 2 ** (len(blocks) - 1),
        latent_channels=channels,
        is_tiny=is_tiny,
        size_bytes=path.stat().st_size,
        license=license_of(path),
    )


def _embedding(path: Path, header: Header) -> EmbeddingEntry:
    """One tensor, or for SDXL `clip_l` and `clip_g`, in the order of its text encoders."""
    names = ("clip_l", "clip_g") if {"clip_l", "clip_g"} <= set(header.shapes) else tuple(header.shapes)
    shapes = [header.shapes[name] for name in names]
    if len(shapes) == 2 and names != ("clip_l", "clip_g"):
        raise UnfitFolder("it has several tensors that are no textual inversion")
    return EmbeddingEntry(
        id=part_id(path),
        path=path,
        widths=tuple(shape[-1] for shape in shapes),
        vectors=shapes[0][0] if len(shapes[0]) == 2 else 1,
        size_bytes=path.stat().st_size,
        license=license_of(path),
    )
