"""Which model made an image's numbers not finite: looked for when it has happened, so that sound images pay nothing.

For the device thread.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fanlight.errors import FanlightError
from services.diffusion.engine.row import Row
from services.diffusion.models.device import DeviceOutOfMemory, translate_oom
from services.diffusion.models.entries import Entry, LoraEntry
from services.diffusion.models.lora_files import read_lora


def culprit(row: Row) -> Entry:
    """The accessory with numbers that are not finite; without one the strongest LoRA; without LoRAs the checkpoint.

    A checkpoint that others use too is the last to blame: its own numbers also show in images without accessories.
    """
    try:
        with translate_oom():
            return _with_bad_numbers(row) or _strongest_lora(row) or row.generation.checkpoint
    except DeviceOutOfMemory:
        return row.generation.checkpoint


def _with_bad_numbers(row: Row) -> Entry | None:
    generation = row.generation
    for control in row.controls:
        if not _are_finite([control.condition, *control.net.parameters()]):
            return control.entry
    for use in generation.loras:
        if not _is_finite_lora(use.entry):
            return use.entry
    if generation.vae is not None and generation.start is not None and not _are_finite(row.checkpoint.vae.parameters()):
        return generation.vae
    return None


def _strongest_lora(row: Row) -> LoraEntry | None:
    uses = sorted(row.generation.loras, key=lambda use: max(abs(use.unet_weight), abs(use.text_weight)))
    return uses[-1].entry if uses else None


def _is_finite_lora(entry: LoraEntry) -> bool:
    try:
        layers = read_lora(entry).layers
    except FanlightError:
        return False
    return _are_finite(
        tensor for part in layers.values() for layer in part.values() for tensor in layer.tensors.values()
    )


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Of any shapes."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
