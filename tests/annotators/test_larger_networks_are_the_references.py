"""The large networks against controlnet_aux's own detectors, with the same random weights. Slow on two busy cores."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.sam import build as build_sam
from services.preprocessor.neural.sam import sam
from services.preprocessor.registry import NEURAL
from tests.fakes.synthetic_images import decoded
from tests.golden.annotator_maps import PHOTO

SIDE_PX = 128
SIZES = {"detect_resolution": SIDE_PX, "image_resolution": SIDE_PX}
# Her eyes, ears, nose, neck, shoulders and arms in the photo, as fractions of it: COCO's 18 parts, None below her hips.
PERSON = (
    *((0.41, 0.39), (0.38, 0.62), (0.14, 0.59), (0.10, 0.70), (0.20, 0.82), (0.62, 0.64), (0.68, 0.75), (0.55, 0.84)),
    *[None] * 6,
    *((0.35, 0.33), (0.48, 0.34), (0.28, 0.35), (0.54, 0.37)),
)


def _photo() -> bytes:
    stream = io.BytesIO()
    Image.open(PHOTO).resize((SIDE_PX, SIDE_PX)).save(stream, "PNG")
    return stream.getvalue()


def _image() -> Image.Image:
    return Image.open(io.BytesIO(_photo()))


@pytest.fixture
def reference(models_dir, weights):
    """controlnet_aux's detector with the same weights as ours."""

    def reference(annotator_id: str, module: str, kind: str):
        model = next(each for each in NEURAL if each.id == annotator_id).models[0]
        weights(model.name)
        with defects.without_arguments():
            return getattr(defects.submodule(module), kind).from_pretrained(str(models_dir / model.manifest.view))

    return reference


CASES = {
    "depth_midas": ("midas", "MidasDetector", {}),
    "normal_midas": ("midas", "MidasDetector", {"depth_and_normal": True, "bg_th": 0.4, "a": 0.5}),
    "normal_bae": ("normalbae", "NormalBaeDetector", {}),
    "depth_leres": ("leres", "LeresDetector", {"thr_a": 10, "thr_b": 20}),
    "depth_leres++": ("leres", "LeresDetector", {"boost": True}),
    "depth_zoe": ("zoe", "ZoeDetector", {}),
}
# Parameters of the detector for which we have separate annotators.
NOT_OURS = {"depth_and_normal", "boost"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("annotator_id", CASES)
async def test_depth_and_normals_are_controlnet_auxs_within_two_levels(annotate, reference, annotator_id):
    module, kind, settings = CASES[annotator_id]
    side_px = 192 if annotator_id == "depth_leres++" else SIDE_PX
    own = {name: value for name, value in settings.items() if name not in NOT_OURS}
    ours = decoded(
        (await annotate(annotator_id, _photo(), size=(side_px, side_px), detect_resolution=side_px, **own)).data
    )
    detector = reference(annotator_id, module, kind)
    if module == "leres":
        detector.model.eval()  # which it forgets
    sizes = {"detect_resolution": side_px, "image_resolution": side_px}
    theirs = detector(_image(), output_type="np", **sizes, **settings)
    theirs = theirs[1] if annotator_id == "normal_midas" else theirs
    assert np.ptp(theirs) > 20, "a flat map proves nothing"
    # A difference in the last bit of depth sometimes moves a pixel over a threshold.
    assert (np.abs(ours.astype(int) - theirs) > 2).mean() <= 0.01


@pytest.fixture
def one_person(monkeypatch):
    """OpenPose detects this person, because random weights detect none; hands and faces are searched around them."""
    body = defects.submodule("open_pose.body")

    def found(*_: object) -> list:
        points = [each and body.Keypoint(x=each[0] * SIDE_PX, y=each[1] * SIDE_PX) for each in PERSON]
        return [body.BodyResult(keypoints=points, total_score=10.0, total_parts=12)]

    monkeypatch.setattr(body.Body, "__call__", lambda *_: (None, None))
    monkeypatch.setattr(body.Body, "format_body_result", found)
    # The maps of random weights have no single highest point, so that the last bit decides; they are compared below.
    face = np.array([[8 + 2 * number % 17, 8 + 3 * number % 19] for number in range(70)])
    monkeypatch.setattr(defects.submodule("open_pose.face").Face, "compute_peaks_from_heatmaps", lambda *_: face)


@pytest.fixture
def matplotlib(monkeypatch):
    """controlnet_aux draws hands with it, but does not list it as a requirement."""
    import colorsys

    colors = SimpleNamespace(hsv_to_rgb=lambda hsv: np.array(colorsys.hsv_to_rgb(*hsv)))
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(colors=colors))


OPENPOSE = {
    "openpose": {"include_body": True, "include_hand": False, "include_face": False},
    "openpose_face": {"include_body": True, "include_hand": False, "include_face": True},
    "openpose_faceonly": {"include_body": False, "include_hand": False, "include_face": True},
    "openpose_full": {"include_body": True, "include_hand": True, "include_face": True},
    "openpose_hand": {"include_body": False, "include_hand": True, "include_face": False},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("annotator_id", OPENPOSE)
async def test_people_are_drawn_as_controlnet_aux_draws_them(annotate, reference, one_person, matplotlib, annotator_id):
    ours = decoded((await annotate(annotator_id, _photo(), detect_resolution=SIDE_PX)).data)
    detector = reference(annotator_id, "open_pose", "OpenposeDetector")
    theirs = detector(_image(), output_type="np", **SIZES, **OPENPOSE[annotator_id])
    assert theirs.any(), "an empty drawing proves nothing"
    assert (np.abs(ours.astype(int) - theirs) > 2).mean() <= 0.01


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_openposes_bodies_hands_and_faces_come_from_the_same_maps(engine, annotate, reference):
    import torch

    await annotate("openpose", _photo(), detect_resolution=SIDE_PX)
    detector = reference("openpose", "open_pose", "OpenposeDetector")
    model = next(each for each in NEURAL if each.id == "openpose").models[0]
    async with engine.cache.use(model) as loaded:
        values = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            both = [_maps(each, values) for each in (loaded.network.detector, detector)]
    for ours, theirs in zip(*both, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def _maps(detector, values) -> list:
    hand, face = detector.hand_estimation.model(values), detector.face_estimation.model(values)
    return [*detector.body_estimation.model(values), hand, *face]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_sam_searches_crops_however_few_points_they_get(annotate):
    few = {"points_per_side": 1, "crop_n_layers": 1, "crop_n_points_downscale_factor": 8}
    control = await annotate("sam", _photo(), model="vit_t", detect_resolution=64, **few)
    assert (control.width_px, control.height_px) == (SIDE_PX, SIDE_PX)


# The annotator's other parameters, at their defaults.
FURTHER = {"crop_n_layers": 0, "crop_n_points_downscale_factor": 1}
LOOSE = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sam_segments_the_image_as_controlnet_aux_does(models_dir, weights):
    weights("vit_t")
    model = next(
        each for annotator in NEURAL if annotator.id == "sam" for each in annotator.models if each.name == "vit_t"
    )
    folder = models_dir / model.manifest.view
    image = np.asarray(_image())
    network = build_sam(folder, AnnotatorDevice(), kind="vit_t", file="mobile_sam.pt")
    (ours,) = sam([image], network, seed=3, **LOOSE, **FURTHER)
    generator = defects.sam_generator()(network.network, **LOOSE)
    np.random.seed(3)  # theirs draws colors from the global state
    theirs = defects.submodule("segment_anything").SamDetector(generator)(image, output_type="np", **SIZES)
    assert theirs.any(), "nothing found proves nothing"
    assert np.array_equal(ours, theirs)
