"""Maps of a real photo stay as they were reviewed."""

import numpy as np
import pytest
from PIL import Image

from services.preprocessor.registry import core
from tests.golden.comparing import OFF_MAX, share_off
from tests.golden.preprocessor_maps import FOLDER, annotated

ANNOTATORS = [annotator.id for annotator in core()]


@pytest.mark.parametrize("annotator", ANNOTATORS)
def test_a_photo_still_gives_the_reviewed_map(annotator):
    golden = np.asarray(Image.open(FOLDER / f"{annotator}.png").convert("RGB"))
    assert share_off(annotated(annotator), golden) <= OFF_MAX


def test_there_is_a_golden_map_for_every_annotator():
    assert sorted(path.stem for path in FOLDER.glob("*.png")) == sorted(ANNOTATORS)
