"""Which part of a model a tensor belongs to, by its name. Pure."""

from collections.abc import Iterable
from itertools import groupby

from services.weights.manifest import TensorEntry

UNET = "unet"
TEXT_ENCODER = "text_encoder"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"
EMA = "ema"
OTHER = "other"

# The names of the original implementation, which single-file checkpoints have.
_SINGLE_FILE = (
    ("model.diffusion_model.", UNET),
    ("model_ema.", EMA),
    ("first_stage_model.encoder.", VAE_ENCODER),
    ("first_stage_model.quant_conv.", VAE_ENCODER),
    ("first_stage_model.", VAE_DECODER),
    ("cond_stage_model.", TEXT_ENCODER),
    ("conditioner.", TEXT_ENCODER),
)
_VAE = (
    ("encoder.", VAE_ENCODER),
    ("quant_conv.", VAE_ENCODER),
    ("decoder.", VAE_DECODER),
    ("post_quant_conv.", VAE_DECODER),
)


def part_of(tensor_name: str) -> str:
    return next((part for prefix, part in _SINGLE_FILE if tensor_name.startswith(prefix)), OTHER)


def part_of_vae(tensor_name: str) -> str:
    return next((part for prefix, part in _VAE if tensor_name.startswith(prefix)), OTHER)


def is_single_file(names: Iterable[str]) -> bool:
    """Whether the names are those of a whole checkpoint in one file."""
    parts = {part_of(name) for name in names}
    return UNET in parts and len(parts - {EMA}) > 1


def is_vae(names: Iterable[str]) -> bool:
    parts = {part_of_vae(name) for name in names}
    return parts == {VAE_ENCODER, VAE_DECODER}


def by_part(tensors: Iterable[TensorEntry]) -> dict[str, tuple[TensorEntry, ...]]:
    """The tensors of a single-file checkpoint, part by part."""
    ordered = sorted(tensors, key=lambda t: (part_of(t.name), t.begin))
    return {part: tuple(group) for part, group in groupby(ordered, key=lambda t: part_of(t.name))}
