"""How far a map is from the one that a person looked at. Other processors and decoders may round differently."""

import numpy as np

# Of what is drawn, how much may be off by more than two levels: edges that flip, tones beside a threshold.
OFF_MAX = 0.01


def share_off(pixels: np.ndarray, golden: np.ndarray) -> float:
    """Against what is not black in the golden map (H, W, 3), for most of an edge map is."""
    off = np.abs(pixels.astype(int) - golden.astype(int)) > 2
    return float(off.sum() / (golden > 2).sum())
