"""Pose estimation for the openpose ControlNet: OpenPose, and DWPose. poses.py draws what they find.

OpenPose: Cao et al. 2017, with the networks of controlnet_aux. DWPose: Yang et al. 2023; boxes around people by YOLOX
(Ge et al. 2021), then 133 points for each by RTMPose (Jiang et al. 2023), both in ONNX Runtime.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, ControlMap, Pixels
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.runtime import TORCH_PACKAGES, inference, open_session, place
from services.preprocessor.poses import Keypoint, Keypoints, Person, draw
from services.preprocessor.weights import AnnotatorWeights, answers_of

# In an image that is this many times as high as wide, OpenPose detects no people: its body network would get it 184
# pixels high and 2 wide, and fails.
OPENPOSE_ASPECT_MAX = 92

# Of DWPose's two networks.
BOX_SIDE_PX, BOX_PAD, BOX_STRIDES = 640, 114, (8, 16, 32)
BOX_SCORE_MIN, BOX_OVERLAP_MAX = 0.3, 0.45
POSE_WIDTH, POSE_HEIGHT, POSE_MARGIN = 288, 384, 1.25
POSE_MEAN, POSE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# The network gives positions in half pixels.
POSE_SPLIT = 2.0
POINT_SCORE_MIN = 0.3
# The index among COCO's 17 points of each of OpenPose's 18 parts; -1 is the neck, the middle of the shoulders.
BODY = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
FACE, LEFT_HAND, RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)

# x1, y1, x2, y2 in pixels.
PersonBox = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPose:
    """controlnet_aux's detector, its three networks on a device."""

    detector: Any
    device: AnnotatorDevice


def build_openpose(folder: Path, device: AnnotatorDevice) -> OpenPose:
    parts = [
        getattr(defects.submodule(f"open_pose.{module}"), kind)(str(folder / file))
        for module, kind, file in (
            ("body", "Body", "body_pose_model.pth"),
            ("hand", "Hand", "hand_pose_model.pth"),
            ("face", "Face", "facenet.pth"),
        )
    ]
    for part in parts:
        part.model = place(part.model, device)
    return OpenPose(detector=defects.submodule("open_pose").OpenposeDetector(*parts), device=device)


def openpose(
    images: Sequence[Pixels], model: OpenPose, *, include_body: bool, include_hand: bool, include_face: bool
) -> list[ControlMap]:
    """A map (H, W, 3) uint8 of each image (H, W, 3), with the people in it."""
    return [_openpose(each, model, include_body, include_hand, include_face) for each in images]


def _openpose(image: Pixels, model: OpenPose, body: bool, hand: bool, face: bool) -> ControlMap:
    """The map (H, W, 3) uint8 of one image (H, W, 3)."""
    height, width = image.shape[:2]
    with inference(model.device):
        found = model.detector.detect_poses(image, hand, face) if height <= OPENPOSE_ASPECT_MAX * width else []
    people = tuple(
        Person(
            body=_points(pose.body.keypoints) if body else (),
            face=_points(pose.face),
            left_hand=_points(pose.left_hand),
            right_hand=_points(pose.right_hand),
        )
        for pose in found
    )
    return ControlMap(pixels=draw(people, width, height), people=people)


def _points(points: Iterable[Any] | None) -> Keypoints:
    """None for points outside the image. Hands and faces come with numpy's numbers, which JSON cannot hold."""
    return tuple(
        None
        if point is None or point.x < 0 or point.y < 0
        else Keypoint(x=float(point.x), y=float(point.y), score=float(point.score))
        for point in points or ()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DwPose:
    """ONNX Runtime sessions."""

    boxes: Any
    points: Any


def build_dwpose(folder: Path, device: AnnotatorDevice) -> DwPose:
    return DwPose(
        boxes=open_session(folder / "yolox_l.onnx", device),
        points=open_session(folder / "dw-ll_ucoco_384.onnx", device),
    )


def dwpose(
    images: Sequence[Pixels], model: DwPose, *, include_body: bool, include_hand: bool, include_face: bool
) -> list[ControlMap]:
    """A map (H, W, 3) uint8 of each image (H, W, 3), with the people in it."""
    return [_dwpose(each, model, include_body, include_hand, include_face) for each in images]


def _dwpose(image: Pixels, model: DwPose, body: bool, hand: bool, face: bool) -> ControlMap:
    """The map (H, W, 3) uint8 of one image (H, W, 3)."""
    height, width = image.shape[:2]
    people = tuple(
        _person(find_points(image, box, model.points), (width, height), body, hand, face)
        for box in find_people(image, model.boxes)
    )
    return ControlMap(pixels=draw(people, width, height), people=people)


def find_people(image: Pixels, session: Any) -> list[PersonBox]:
    """Boxes around the people in an image (H, W, 3) uint8, the most confident first.

    The box of the whole image if no people were found, as DWPose does.
    """
    height, width = image.shape[:2]
    scale = min(BOX_SIDE_PX / height, BOX_SIDE_PX / width)
    small = cv2.resize(image, (max(1, int(width * scale)), max(1, int(height * scale))))
    square = np.full((BOX_SIDE_PX, BOX_SIDE_PX, 3), BOX_PAD, np.uint8)
    square[: small.shape[0], : small.shape[1]] = small
    values = square[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32)
    rows = answers_of(session.run(None, {session.get_inputs()[0].name: values}))[0][0]
    boxes, scores = _decode_boxes(rows)
    corners = [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for x1, y1, x2, y2 in boxes / scale]
    kept = cv2.dnn.NMSBoxes(corners, scores.tolist(), BOX_SCORE_MIN, BOX_OVERLAP_MAX)
    found = [corners[int(index)] for index in np.asarray(kept).ravel()]
    return [(x, y, x + w, y + h) for x, y, w, h in found] or [(0.0, 0.0, float(width), float(height))]


def _decode_boxes(rows: Any) -> tuple[Any, Any]:
    """Corners (N, 4) in the square's pixels and people's scores (N,), 0 to 1, from YOLOX's rows (N, 85)."""
    grids, strides = [], []
    for stride in BOX_STRIDES:
        cells = BOX_SIDE_PX // stride
        y, x = np.mgrid[:cells, :cells]
        grids.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((cells * cells, 1), stride))
    grid, stride_of = np.concatenate(grids), np.concatenate(strides)
    center = (rows[:, :2] + grid) * stride_of
    half = np.exp(rows[:, 2:4]) * stride_of / 2
    return np.concatenate([center - half, center + half], axis=1), rows[:, 4] * rows[:, 5]


def find_points(image: Pixels, box: PersonBox, session: Any) -> Any:
    """(133, 3) float64: x and y in the pixels of an image (H, W, 3) uint8, and the confidence."""
    to_box, back = _transforms(box)
    crop = cv2.warpAffine(image, to_box, (POSE_WIDTH, POSE_HEIGHT), flags=cv2.INTER_LINEAR)
    values = ((crop - np.array(POSE_MEAN)) / np.array(POSE_STD)).transpose(2, 0, 1)[None].astype(np.float32)
    rows_x, rows_y = answers_of(session.run(None, {session.get_inputs()[0].name: values}))[:2]
    at = np.stack([rows_x[0].argmax(axis=1), rows_y[0].argmax(axis=1)], axis=1) / POSE_SPLIT
    score = np.minimum(rows_x[0].max(axis=1), rows_y[0].max(axis=1))
    placed = np.concatenate([at, np.ones((len(at), 1))], axis=1) @ back.T
    return np.concatenate([placed, score[:, None]], axis=1)


def _transforms(box: PersonBox) -> tuple[Any, Any]:
    """Affine maps (2, 3) from the image to the network's view of a box with a margin, and back."""
    x1, y1, x2, y2 = box
    width, height = (x2 - x1) * POSE_MARGIN, (y2 - y1) * POSE_MARGIN
    scale = min(POSE_WIDTH / max(width, 1.0), POSE_HEIGHT / max(height, 1.0))
    shift_x = POSE_WIDTH / 2 - (x1 + x2) / 2 * scale
    shift_y = POSE_HEIGHT / 2 - (y1 + y2) / 2 * scale
    to_box = np.array([[scale, 0, shift_x], [0, scale, shift_y]])
    back = np.array([[1 / scale, 0, -shift_x / scale], [0, 1 / scale, -shift_y / scale]])
    return to_box, back


def _person(points: Any, size: tuple[int, int], body: bool, hand: bool, face: bool) -> Person:
    """Of points (133, 3) in the pixels of an image of this width and height."""
    keypoints = [_keypoint(row, size) for row in points]
    return Person(
        body=tuple(_neck(points, size) if index < 0 else keypoints[index] for index in BODY) if body else (),
        face=tuple(keypoints[FACE]) if face else (),
        left_hand=_hand(keypoints[LEFT_HAND]) if hand else (),
        right_hand=_hand(keypoints[RIGHT_HAND]) if hand else (),
    )


def _neck(points: Any, size: tuple[int, int]) -> Keypoint | None:
    """The middle of the shoulders, of points (133, 3)."""
    shoulders = points[[LEFT_SHOULDER, RIGHT_SHOULDER]]
    return _keypoint((*shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()), size)


def _keypoint(row: Any, size: tuple[int, int]) -> Keypoint | None:
    """Of (3,): x, y and confidence; None below the least confidence."""
    x, y, score = (float(each) for each in row)
    return Keypoint(x=x / size[0], y=y / size[1], score=min(score, 1.0)) if score >= POINT_SCORE_MIN else None


def _hand(points: list[Keypoint | None]) -> Keypoints:
    """Empty for a hand of which no point was found."""
    return tuple(points) if any(points) else ()


OPENPOSE = AnnotatorWeights(name="openpose", entry="annotator-openpose", build=build_openpose)
OPENPOSE_PARAMETERS = (
    Parameter(name="include_body", default=True, description="Draw bodies"),
    Parameter(name="include_hand", default=False, description="Detect and draw hands"),
    Parameter(name="include_face", default=False, description="Detect and draw faces"),
)


def _openpose_annotator(annotator_id: str, description: str, parts: tuple[bool, bool, bool] | None = None) -> Annotator:
    """`parts`: whether bodies, hands and faces are detected; None leaves that to the request's parameters."""
    fixed: dict[str, Any] = dict(zip((part.name for part in OPENPOSE_PARAMETERS), parts, strict=True)) if parts else {}
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(openpose, **fixed),
        parameters=() if fixed else OPENPOSE_PARAMETERS,
        controlnets=("openpose",),
        models=(OPENPOSE,),
        needs=(*TORCH_PACKAGES, "torchvision", "scipy", "skimage"),
        license="non-commercial: see the license of OpenPose",
        detect_resolution=512,
    )


DWPOSE = AnnotatorWeights(name="dwpose", entry="annotator-dwpose", build=build_dwpose, uses_gpu=False)

ANNOTATORS = (
    _openpose_annotator("openpose", "Bodies as stick figures"),
    _openpose_annotator("openpose_face", "Bodies and faces", (True, False, True)),
    _openpose_annotator("openpose_faceonly", "Faces only", (False, False, True)),
    _openpose_annotator("openpose_full", "Bodies, hands and faces", (True, True, True)),
    _openpose_annotator("openpose_hand", "Hands only", (False, True, False)),
    Annotator(
        id="dwpose",
        description="Bodies, hands and faces as stick figures, more reliable than openpose",
        apply=dwpose,
        parameters=(
            Parameter(name="include_body", default=True, description="Draw bodies"),
            Parameter(name="include_hand", default=True, description="Draw hands"),
            Parameter(name="include_face", default=True, description="Draw faces"),
        ),
        controlnets=("openpose",),
        models=(DWPOSE,),
        needs=("onnxruntime",),
        detect_resolution=512,
    ),
)
