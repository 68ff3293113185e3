"""Networks with real weights on a real photo: maps that a person reviewed, and controlnet_aux's own."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.hed import OnnxHed, as_onnx
from services.preprocessor.neural.runtime import open_session
from tests.fakes.synthetic_images import decoded
from tests.golden.annotator_maps import ANNOTATORS, FOLDER, PHOTO, RESOLUTION
from tests.golden.comparing import OFF_MAX, share_off
from tests.golden.preprocessor_maps import FOLDER as WITHOUT_WEIGHTS_FOLDER

# Each of these has a golden map, which tests/unit/preprocessor compares.
WITHOUT_WEIGHTS = [path.stem for path in WITHOUT_WEIGHTS_FOLDER.glob("*.png")]


@pytest.mark.parametrize("annotator", ANNOTATORS)
async def test_a_photo_still_gives_the_reviewed_map(annotate, annotator):
    control = await annotate(annotator, PHOTO.read_bytes(), detect_resolution=RESOLUTION)
    golden = np.asarray(Image.open(FOLDER / f"{annotator}.png").convert("RGB"))
    assert share_off(decoded(control.data), golden) <= OFF_MAX


@pytest.mark.parametrize(("scribble", "safe"), [(False, False), (False, True), (True, False), (True, True)])
async def test_hed_is_controlnet_auxs_within_a_level(annotate, models_dir, scribble, safe):
    annotator = f"{'scribble' if scribble else 'softedge'}_hed{'safe' if safe else ''}"
    ours = decoded((await annotate(annotator, PHOTO.read_bytes(), detect_resolution=RESOLUTION)).data)
    detector = defects.submodule("hed").HEDdetector.from_pretrained(str(models_dir / "lllyasviel" / "Annotators"))
    theirs = detector(
        Image.open(PHOTO),
        detect_resolution=RESOLUTION,
        image_resolution=RESOLUTION,
        scribble=scribble,
        safe=safe,
        output_type="np",
    )
    # Quantizing and scribbles sometimes turn a difference in the last bit into a whole level.
    assert (np.abs(ours.astype(int) - theirs) > 1).mean() <= 0.001


async def test_heds_edges_differ_from_torchs_by_less_than_a_thousandth(weights, models_dir):
    weights("hed")
    import torch

    state = torch.load(models_dir / "lllyasviel" / "Annotators" / "ControlNetHED.pth", weights_only=True)
    network = defects.submodule("hed").ControlNetHED_Apache2()
    network.load_state_dict(state)
    image = np.asarray(Image.open(PHOTO))
    ours = OnnxHed(open_session(as_onnx({name: each.numpy() for name, each in state.items()}), AnnotatorDevice()))(
        [image]
    )
    with torch.no_grad():
        theirs = network(torch.from_numpy(image.copy()).float().permute(2, 0, 1)[None])
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(_sigmoid(one) - _sigmoid(other.numpy()[:, 0])).max() <= 1e-3


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values.astype(np.float64)))


async def test_no_face_is_drawn_in_an_image_without_people(annotate):
    coffee = PHOTO.parents[3] / "demo" / "photos" / "coffee.jpg"
    control = await annotate("mediapipe_face", coffee.read_bytes())
    assert decoded(control.data).max() == 0


async def test_the_face_is_where_the_face_is(annotate):
    control = await annotate("mediapipe_face", PHOTO.read_bytes())
    y, x = np.nonzero(decoded(control.data).any(axis=2))
    # In the photo of 256 x 256 the face is about 60 wide, right of the middle's left.
    assert 40 < np.ptp(x) < 110
    assert 60 < x.mean() < 130
    assert 60 < y.mean() < 130
    assert control.device == "cpu/float32"


async def test_a_body_is_where_the_body_is(annotate):
    control = await annotate("mediapipe_pose", PHOTO.read_bytes())
    (person,) = json.loads(control.pose_json)["people"]
    nose, neck, right, left = (person["pose_keypoints_2d"][3 * part :][:3] for part in (0, 1, 2, 5))
    # In the photo of 256 x 256 she looks at us: her nose above her neck, her right shoulder left of her left one.
    assert nose == pytest.approx([106, 101, 1], abs=8)
    assert neck == pytest.approx([97, 158, 1], abs=12)
    assert right[0] < neck[0] < left[0]
    # Hips, knees and feet, which the photo does not show, are not invented.
    assert person["pose_keypoints_2d"][3 * 8 : 3 * 14] == [0] * 18
    assert decoded(control.data)[int(nose[1]), int(nose[0])].any()


@pytest.mark.parametrize("photo", ["coffee.jpg", "cat.jpg", "rocket.jpg"])
async def test_no_body_is_drawn_in_an_image_without_people(annotate, photo):
    control = await annotate("mediapipe_pose", (PHOTO.parents[3] / "demo" / "photos" / photo).read_bytes())
    assert json.loads(control.pose_json)["people"] == []
    assert decoded(control.data).max() == 0


async def test_the_person_is_what_stays_without_the_background(annotate):
    control = await annotate("remove_background", PHOTO.read_bytes(), model="selfie_segmentation")
    pixels = np.asarray(Image.open(io.BytesIO(control.data)))
    assert pixels.shape == (256, 256, 4)
    alpha = pixels[:, :, 3]
    # Her face, chest and arm; the wall beside her head, and the rocket at the right.
    for left, top, right, bottom in ((85, 60, 130, 130), (60, 200, 150, 255), (170, 225, 195, 255)):
        assert alpha[top:bottom, left:right].min() > 200
    for left, top, right, bottom in ((0, 0, 35, 120), (180, 0, 255, 120), (235, 100, 255, 200)):
        assert alpha[top:bottom, left:right].max() < 50
    assert 0.4 < (alpha > 127).mean() < 0.6


async def test_the_background_alone_is_a_mask_to_inpaint_with(annotate):
    """White is what inpainting replaces; both masks have the photo's size, as inpainting wants it."""
    wanted = {"model": "selfie_segmentation"}
    masks = {}
    for output in ("image", "mask", "background_mask"):
        control = await annotate("remove_background", PHOTO.read_bytes(), output=output, **wanted)
        masks[output] = Image.open(io.BytesIO(control.data))
    alpha, mask, background = (np.asarray(masks[name]) for name in masks)
    assert masks["mask"].mode == masks["background_mask"].mode == "L"
    assert np.array_equal(alpha[:, :, 3], mask)
    assert np.array_equal(background, 255 - mask)
    assert mask[95, 106] > 250
    assert background[10, 10] > 250


def test_ten_annotators_and_more_give_real_maps_of_a_real_photo():
    assert len({*ANNOTATORS, *WITHOUT_WEIGHTS}) >= 10
