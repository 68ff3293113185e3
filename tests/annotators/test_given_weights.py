"""Networks on real weights that no package holds: those in the folder that ANNOTATOR_WEIGHTS names, and only those.

`make annotators WEIGHTS=FOLDER` names it. A file in it counts by its name, such as `table5_pidinet.pth`, and has to be
the one that the catalog pins. Every network whose files are all there is run; what is known of its maps is checked.
"""

import asyncio
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.neural import defects
from services.preprocessor.registry import NEURAL, installed
from services.preprocessor.weights import FolderWeights
from tests.annotators.conftest import Nowhere
from tests.fakes.annotator_weights import MODELS
from tests.golden.annotator_maps import PHOTO

VARIABLE = "ANNOTATOR_WEIGHTS"
GIVEN = Path(os.environ.get(VARIABLE) or "/nonexistent")
DEMO = PHOTO.parents[3] / "demo" / "photos"
SIDE_PX = 512


def is_given(network: str) -> bool:
    return all((GIVEN / Path(file).name).is_file() for file in MODELS[network].files)


def needs(network: str) -> pytest.MarkDecorator:
    files = ", ".join(MODELS[network].files)
    return pytest.mark.skipif(not is_given(network), reason=f"{VARIABLE} names no folder with {files}")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("given")
    for network in filter(is_given, MODELS):
        folder = root / MODELS[network].manifest.view
        for file in MODELS[network].files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(GIVEN / Path(file).name, folder / file)
    return root


@pytest.fixture
def draw(models):
    async def draw(annotator_id: str, photo: Path, **parameters: object) -> np.ndarray:
        """(H, W) uint8, at the photo's own size; the mean of the colors."""
        data = await asyncio.to_thread(photo.read_bytes)
        engine = AnnotationEngine(threads=2, limits=ImageLimits(), weights=FolderWeights(models, Nowhere()))
        annotator = installed().get(annotator_id)
        values = {each.name: each.default for each in annotator.all_parameters} | parameters
        result = await engine.run(Annotation(annotator=annotator, parameters=values, image=data))
        engine.close()
        return np.asarray(Image.open(io.BytesIO(result.data)).convert("L"))

    return draw


RUNS = [
    pytest.param(each.id, network.name, id=f"{each.id}-{network.name}", marks=needs(network.name))
    for each in NEURAL
    for network in each.models
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("annotator_id", "network"), RUNS)
async def test_the_files_are_the_pinned_ones_and_draw_something(draw, models, annotator_id, network):
    assert MODELS[network].altered_files(models / MODELS[network].manifest.view) == ()
    annotator = next(each for each in NEURAL if each.id == annotator_id)
    chosen = {"model": network} if len(annotator.models) > 1 else {}
    maps = [await draw(annotator_id, photo, **chosen) for photo in (PHOTO, DEMO / "rocket.jpg")]
    assert max(np.ptp(each) for each in maps) > 60, "a flat map"
    small = [np.asarray(Image.fromarray(each).resize((64, 64))).astype(int) for each in maps]
    assert np.abs(small[0] - small[1]).mean() > 5, "the photo changes nothing"


PIDINET = ("softedge_pidinet", "softedge_pidsafe", "scribble_pidinet", "scribble_pidsafe")
# Where the astronaut's photo of 256 x 256 has outlines, and where it has none: x and y of the corners of boxes.
OUTLINES = {
    "hair's left edge": (44, 28, 64, 60),
    "helmet's ring": (10, 110, 170, 220),
    "shoulder": (150, 190, 210, 250),
}
FLAT = {"wall above left": (4, 4, 36, 90), "wall beside the hair": (180, 4, 212, 60)}


@needs("pidinet")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("annotator_id", PIDINET)
async def test_pidinet_draws_outlines_and_no_texture_of_the_wall(draw, annotator_id):
    pixels = await draw(annotator_id, PHOTO)
    for name, (left, top, right, bottom) in OUTLINES.items():
        assert pixels[top:bottom, left:right].max() > 200, name
    for name, (left, top, right, bottom) in FLAT.items():
        assert pixels[top:bottom, left:right].max() < 60, name
    assert 0.03 < (pixels > 127).mean() < 0.25


@needs("pidinet")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("annotator_id", "settings"),
    [("softedge_pidinet", {}), ("softedge_pidsafe", {"safe": True}), ("scribble_pidinet", {"scribble": True})],
)
async def test_pidinets_map_is_controlnet_auxs_within_a_level(draw, models, annotator_id, settings):
    ours = await draw(annotator_id, PHOTO, detect_resolution=256)
    folder = models / MODELS["pidinet"].manifest.view
    detector = defects.submodule("pidi").PidiNetDetector.from_pretrained(str(folder))
    sizes = {"detect_resolution": 256, "image_resolution": 256}
    theirs = detector(Image.open(PHOTO), output_type="np", **sizes, **settings)[:, :, 0]
    assert np.ptp(theirs) > 200
    assert (np.abs(ours.astype(int) - theirs) > 1).mean() <= 0.01


@needs("mlsd_tiny")
@pytest.mark.timeout(300)
async def test_mlsd_draws_the_towers_beside_the_rocket(draw):
    """Two lattice towers at the left and right, the rocket between them, sky above; the photo is 327 x 327."""
    pixels = await draw("mlsd", DEMO / "rocket.jpg", model="mlsd_tiny", detect_resolution=SIDE_PX)
    width = pixels.shape[1]
    columns = (pixels > 60).mean(axis=0)
    for name, left, right in (("left tower", 0.02, 0.2), ("rocket", 0.4, 0.6), ("right tower", 0.8, 1.0)):
        assert columns[int(left * width) : int(right * width)].max() > 0.25, name
    for name, left, right in (("sky left", 0.22, 0.38), ("sky right", 0.62, 0.78)):
        assert columns[int(left * width) : int(right * width)].max() < 0.15, name


@needs("mlsd_tiny")
@pytest.mark.timeout(300)
async def test_mlsd_draws_few_lines_where_nothing_is_straight(draw):
    cat = await draw("mlsd", DEMO / "cat.jpg", model="mlsd_tiny")
    rocket = await draw("mlsd", DEMO / "rocket.jpg", model="mlsd_tiny")
    assert (cat > 60).mean() < 0.2 * (rocket > 60).mean()
