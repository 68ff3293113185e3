"""The vectors of textual inversions that a LoRA's file brings along for its trigger words."""

import torch
from torch import Tensor

from services.diffusion.models.entries import EmbeddingEntry
from services.diffusion.models.faults import CONTENT_ERRORS, damaged
from services.diffusion.models.lora_entries import bundled_order
from services.diffusion.models.lora_names import BUNDLED
from services.weights.loading import load_safetensors
from services.weights.references.tensors import BadHeader


def read_bundled(entry: EmbeddingEntry) -> tuple[Tensor, ...]:
    """Vectors (N, D) of float32 for each text encoder. UnusableModel where they are damaged."""
    head = f"{BUNDLED}{entry.id}."
    try:
        found = load_safetensors(entry.path, prefixes=(head,))
        own = {name.removeprefix(head): tensor for name, tensor in found.items()}
        vectors = [own[name].float() for name in bundled_order(own)]
        if not vectors or not all(bool(torch.isfinite(each).all()) for each in vectors):
            raise ValueError("no vectors, or some that are not finite")
    except (*CONTENT_ERRORS, BadHeader) as error:
        message = f"the textual inversion {entry.id} in LoRA {entry.bundled_in} cannot be loaded: it is damaged"
        raise damaged(entry.bundled_in, error, message) from error
    return tuple(each[None] if each.dim() == 1 else each for each in vectors)
