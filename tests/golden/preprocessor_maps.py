"""Reviewed control images: `python -m tests.golden.preprocessor_maps` draws them again.

Review them after that, and raise the annotator's `revision` when its map has changed.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from services.preprocessor.registry import core

FOLDER = Path(__file__).parent / "preprocessor"
PHOTO = Path(__file__).parents[2] / "demo" / "photos" / "coffee.jpg"
SIDE_PX = 128

# Parameters that show an annotator's effect better than its defaults on a small image.
PARAMETERS = {"tile": {"down_sampling_rate": 8.0}, "shuffle": {"f": 64, "seed": 7}}


def annotated(annotator_id: str) -> np.ndarray:
    """uint8 RGB (H, W, 3)."""
    annotator = core().get(annotator_id)
    values = {p.name: p.default for p in annotator.parameters} | PARAMETERS.get(annotator_id, {})
    photo = Image.open(PHOTO).convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    if annotator.keeps_alpha:
        photo.putalpha(Image.radial_gradient("L").resize(photo.size))
    return np.asarray(Image.fromarray(annotator(np.asarray(photo), **values)).convert("RGB"))


def main() -> None:
    for annotator in core():
        Image.fromarray(annotated(annotator.id)).save(FOLDER / f"{annotator.id}.png", optimize=True)


if __name__ == "__main__":
    main()
