"""Which tensors of a file are a textual inversion's vectors: of safetensors and pickles alike. Loads no torch."""

from collections.abc import Mapping
from math import prod

# Larger files are no textual inversions: this is 5,000 vectors of SDXL.
EMBEDDING_LIMIT_BYTES = 16 * 1024 * 1024
EMBEDDING_PICKLES = frozenset({".pt", ".bin"})
# SDXL's, in the order of its text encoders: kohya's and diffusers' names.
_PAIRS = (
    ("clip_l", "clip_g"),
    ("text_encoders_0", "text_encoders_1"),
    ("text_encoder_0", "text_encoder_1"),
    ("text_encoder", "text_encoder_2"),
)
# A1111's.
_VECTORS = "emb_params"
# Beside the vectors some files have a number or two.
_TENSORS_LIMIT = 8
Shape = tuple[int, ...]


def vectors_among(shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The names of the vectors, (N, D) or (D,) for each text encoder in order; empty for no textual inversion.

    `shapes`: of all tensors of the file, by name.
    """
    if not 0 < len(shapes) <= _TENSORS_LIMIT or any(len(shape) > 2 for shape in shapes.values()):
        return ()
    for names in (*_PAIRS, (_VECTORS,)):
        if set(names) <= set(shapes):
            return names if all(prod(shapes[name]) for name in names) else ()
    rows = tuple(name for name, shape in shapes.items() if len(shape) in (1, 2) and prod(shape) > 1)
    return rows if len(rows) == 1 else ()


def widths_of(shapes: Mapping[str, Shape], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(shapes[name][-1] for name in names)


def count_of(shapes: Mapping[str, Shape], names: tuple[str, ...]) -> int:
    """How many tokens of a prompt it takes up."""
    first = shapes[names[0]]
    return first[0] if len(first) == 2 else 1


def too_large(size_bytes: int) -> str:
    limit = EMBEDDING_LIMIT_BYTES // 2**20
    return f"it has {size_bytes / 2**20:.0f} MiB, and a textual inversion has at most {limit}"
