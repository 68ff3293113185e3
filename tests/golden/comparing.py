"""How far a map is from the reviewed one. Other processors and decoders may round differently."""

import numpy as np

# The fraction of drawn pixels that may be off by more than two levels: edges that flip, tones near a threshold.
OFF_MAX = 0.01


def share_off(pixels: np.ndarray, golden: np.ndarray) -> float:
    """The fraction of values off by more than two levels, of maps (H, W, 3) uint8, 0 to 255.

    Relative to what is not black in the golden map, because most of an edge map is black.
    """
    off = np.abs(pixels.astype(int) - golden.astype(int)) > 2
    return float(off.sum() / (golden > 2).sum())
