"""Textual inversions: from their files to text encoders with a few more tokens. Tokenizers are not changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fanlight.errors import FanlightError
from services.diffusion.models.device import shallow_copy_module
from services.diffusion.models.embedding_files import EMBEDDING_PICKLES, vectors_among
from services.diffusion.models.embedding_pickles import pickled_tensors
from services.diffusion.models.entries import EmbeddingEntry
from services.diffusion.models.faults import CONTENT_ERRORS, UnusableModel, damaged
from services.diffusion.prompt import TextPart
from services.weights.loading import load_safetensors


class ExtendedEmbedding(nn.Module):
    """An embedding table with more rows behind its end. The table itself is shared."""

    def __init__(self, table: Any, rows: Tensor) -> None:
        super().__init__()
        self._table = table
        self.register_buffer("rows", rows, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The shared table, (V, D): one row for each token."""
        weight: Tensor = self._table.weight
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L), 0 to V + N - 1, to their vectors (B, L, D)."""
        count = self.weight.shape[0]
        known = embedding(ids.clamp(max=count - 1), self.weight)
        added = embedding((ids - count).clamp(min=0), self.rows)  # type: ignore[arg-type]
        return torch.where((ids >= count)[..., None], added, known)


def read_embedding(entry: EmbeddingEntry) -> tuple[Tensor, ...]:
    """Vectors (N, D) of float32 for each text encoder (Gal et al. 2022). UnusableModel for a damaged file.

    Of a pickle only tensors are read.
    """
    try:
        is_pickle = entry.path.suffix.lower() in EMBEDDING_PICKLES
        found = pickled_tensors(entry.path) if is_pickle else load_safetensors(entry.path)
        names = vectors_among({name: tuple(tensor.shape) for name, tensor in found.items()})
        if not names:
            raise ValueError("no textual inversion")
        vectors = [_rows(found[name]) for name in names]
    except (*CONTENT_ERRORS, FanlightError) as error:
        message = f"embedding {entry.id} cannot be loaded: its file is missing, damaged or no textual inversion"
        raise damaged(entry.id, error, message) from error
    return tuple(vectors)


def add_rows(encoder: Any, rows: Sequence[Tensor]) -> Any:
    """A shallow copy of the encoder with these rows, (N, D) each, behind its table (V, D)."""
    copy = shallow_copy_module(encoder, lambda name, tensor: tensor)
    table = copy.embeddings.token_embedding
    more = torch.cat([each.to(table.weight.device, table.weight.dtype) for each in rows])
    copy.embeddings.token_embedding = ExtendedEmbedding(table, more)
    return copy


def with_rows(text: TextPart, rows: Mapping[str, Tensor]) -> TextPart:
    """The text encoder with these vectors, (N, D) by the name of their embedding."""
    start = text.encoder.embeddings.token_embedding.weight.shape[0]
    added = {}
    for name, vectors in rows.items():
        added[name] = tuple(range(start, start + len(vectors)))
        start += len(vectors)
    return replace(text, encoder=add_rows(text.encoder, list(rows.values())), added=added)


def check_widths(entry: EmbeddingEntry, vectors: Sequence[Tensor], widths: Sequence[int], checkpoint_id: str) -> None:
    """UnusableModel where the vectors are not one tensor (N, D) for each text encoder, D of `widths`."""
    own = tuple(each.shape[-1] for each in vectors)
    if own != tuple(widths):
        raise UnusableModel(
            f"embedding {entry.id} has vectors of {_listed(own)}, {checkpoint_id} takes {_listed(widths)}",
            field="embeddings",
        )


def check_length(entry: EmbeddingEntry, vectors: Sequence[Tensor], texts: Sequence[TextPart]) -> None:
    """UnusableModel where it has more vectors (N, D) than a text encoder takes tokens at once."""
    room = min(text.positions for text in texts) - 2
    longest = max(map(len, vectors))
    if longest > room:
        raise UnusableModel(
            f"embedding {entry.id} has {longest} vectors, and a prompt's part takes {room}", field="embeddings"
        )


def _rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().float()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not rows.numel():
        raise ValueError("the vectors are not in rows")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the vectors are not finite")
    return rows


def _listed(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths)) or "no"
