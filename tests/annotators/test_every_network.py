"""Every network end to end: on random weights in the expected files if no package contains real ones.

What comes out is checked for size, channels and range, and against controlnet_aux on the same weights.
"""

import io
import json

import numpy as np
import pytest
from PIL import Image

from services.preprocessor.neural import defects
from services.preprocessor.registry import NEURAL
from tests.fakes.synthetic_images import decoded
from tests.golden.annotator_maps import ANNOTATORS, PHOTO

SIDE_PX = 128
# Parameters that keep the slow ones short.
PARAMETERS = {"sam": {"model": "vit_t", "points_per_side": 2}, "depth_leres++": {"detect_resolution": 192}}
# Each takes minutes on two busy cores, because its weights are large.
SLOW = {"depth_zoe", "depth_leres", "depth_leres++", "depth_midas", "normal_midas", "normal_bae", "sam"}
SLOW |= {each.id for each in NEURAL if each.id.startswith("openpose")}


# The first annotator of each network.
NETWORKS = {each.models[0].name: each for each in reversed(NEURAL)}.values()


def _photo(width_px: int = SIDE_PX, height_px: int = SIDE_PX) -> bytes:
    stream = io.BytesIO()
    Image.open(PHOTO).resize((width_px, height_px)).save(stream, "PNG")
    return stream.getvalue()


def _each(annotator):
    return pytest.param(annotator, id=annotator.id, marks=[pytest.mark.slow] if annotator.id in SLOW else [])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("annotator", [_each(each) for each in NEURAL if each.id not in ANNOTATORS])
async def test_it_gives_a_map_of_the_right_size_and_range(annotate, annotator):
    parameters = {"detect_resolution": SIDE_PX} | PARAMETERS.get(annotator.id, {})
    control = await annotate(annotator.id, _photo(), **parameters)
    assert (control.width_px, control.height_px) == (SIDE_PX, SIDE_PX)
    assert control.device == "cpu/float32"
    pixels = np.asarray(Image.open(io.BytesIO(control.data)).convert("RGBA"))
    assert pixels.shape == (SIDE_PX, SIDE_PX, 4)
    if annotator.is_bilevel:
        assert set(np.unique(pixels)) <= {0, 255}
    if annotator.id in ("dwpose", *(each.id for each in NEURAL if each.id.startswith("openpose"))):
        assert json.loads(control.pose_json)["canvas_width"] == SIDE_PX


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("annotator", [_each(each) for each in NETWORKS])
@pytest.mark.parametrize(("width_px", "height_px"), [(1, 1), (9, 300), (2000, 1)])
async def test_it_works_at_an_images_own_size(annotate, annotator, width_px, height_px):
    parameters = PARAMETERS.get(annotator.id, {}) | {"detect_resolution": 0}
    control = await annotate(annotator.id, _photo(width_px, height_px), **parameters)
    assert (control.width_px, control.height_px) == (width_px, height_px)
    assert Image.open(io.BytesIO(control.data)).size == (width_px, height_px)


async def test_dwpose_finds_the_points_that_its_networks_answer(annotate):
    control = await annotate("dwpose", _photo(), detect_resolution=SIDE_PX)
    (person,) = json.loads(control.pose_json)["people"]
    assert len(person["pose_keypoints_2d"]) == 3 * 18
    assert len(person["face_keypoints_2d"]) == 3 * 68
    assert len(person["hand_left_keypoints_2d"]) == len(person["hand_right_keypoints_2d"]) == 3 * 21
    # Later points lie farther down to the right, as the fake network says.
    nose, right_shoulder = person["pose_keypoints_2d"][:2], person["pose_keypoints_2d"][6:8]
    assert nose[0] < right_shoulder[0]
    assert nose[1] < right_shoulder[1]
    assert decoded(control.data).any()


async def test_a_background_is_transparent_where_the_network_says(annotate):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    for model in ("u2net", "isnet-general-use"):
        control = await annotate("remove_background", stream.getvalue(), model=model)
        alpha = np.asarray(Image.open(io.BytesIO(control.data)))[:, :, 3]
        assert alpha[:, :28].max() <= 2
        assert alpha[:, 36:].min() >= 253


REFERENCES = {
    "softedge_pidinet": ("pidi", "PidiNetDetector", {"safe": False}),
    "softedge_pidsafe": ("pidi", "PidiNetDetector", {"safe": True}),
    "scribble_pidinet": ("pidi", "PidiNetDetector", {"scribble": True}),
    "lineart_realistic": ("lineart", "LineartDetector", {"coarse": False}),
    "lineart_coarse": ("lineart", "LineartDetector", {"coarse": True}),
    "lineart_anime": ("lineart_anime", "LineartAnimeDetector", {}),
    "mlsd": ("mlsd", "MLSDdetector", {}),
    "teed": ("teed", "TEEDdetector", {}),
    "anyline": ("anyline", "AnylineDetector", {}),
}
FILES = {"teed": "7_model.pth", "anyline": "MTEED.pth"}


@pytest.mark.filterwarnings("ignore:Parameter `min_size`:FutureWarning", "ignore:overflow")
@pytest.mark.parametrize("annotator_id", REFERENCES)
async def test_it_is_controlnet_auxs_within_a_level(annotate, models_dir, annotator_id):
    ours = decoded((await annotate(annotator_id, _photo(), detect_resolution=SIDE_PX)).data)
    module, kind, settings = REFERENCES[annotator_id]
    annotator = next(each for each in NEURAL if each.id == annotator_id)
    file = {"filename": FILES[annotator_id]} if annotator_id in FILES else {}
    detector = getattr(defects.submodule(module), kind).from_pretrained(
        str(models_dir / annotator.models[0].manifest.view), **file
    )
    sizes = {"detect_resolution": SIDE_PX} | ({} if file else {"image_resolution": SIDE_PX})
    theirs = detector(Image.open(io.BytesIO(_photo())), output_type="np", **sizes, **settings)
    assert np.ptp(theirs) > 100, "a flat map proves nothing"
    # Ours runs channels last: a difference in the last bit sometimes changes a step, a ridge or an overflowed byte.
    assert (np.abs(ours.astype(int) - theirs) > 1).mean() <= 0.01
