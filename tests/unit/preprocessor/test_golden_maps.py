"""Maps of a real photo stay what a person looked at. Other processors and decoders may round differently."""

import numpy as np
import pytest
from PIL import Image

from services.preprocessor.registry import core
from tests.golden.preprocessor_maps import FOLDER, annotated

# Of the pixels, how many may be off by more than two levels: edges that flip, tones beside a threshold.
FLIPPED_MAX = 0.01
ANNOTATORS = [annotator.id for annotator in core()]


@pytest.mark.parametrize("annotator", ANNOTATORS)
def test_a_photo_still_gives_the_map_that_was_looked_at(annotator):
    golden = np.asarray(Image.open(FOLDER / f"{annotator}.png").convert("RGB")).astype(int)
    assert (np.abs(annotated(annotator) - golden) > 2).mean() <= FLIPPED_MAX


def test_there_is_a_golden_map_for_every_annotator():
    assert sorted(path.stem for path in FOLDER.glob("*.png")) == sorted(ANNOTATORS)
