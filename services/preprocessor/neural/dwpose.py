"""People by DWPose (Yang et al. 2023): boxes by YOLOX, then 133 points by RTMPose, both with ONNX Runtime."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Drawn, Pixels
from services.preprocessor.device import Device
from services.preprocessor.neural.onnx_session import open_session
from services.preprocessor.poses import Keypoint, Keypoints, Person, draw
from services.preprocessor.weights import Model

BOX_SIDE_PX, BOX_PAD, BOX_STRIDES = 640, 114, (8, 16, 32)
BOX_SCORE_MIN, BOX_OVERLAP_MAX = 0.3, 0.45
POSE_WIDTH, POSE_HEIGHT, POSE_MARGIN = 288, 384, 1.25
POSE_MEAN, POSE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# The network tells positions in halves of a pixel.
POSE_SPLIT = 2.0
POINT_SCORE_MIN = 0.3
# Where OpenPose's 18 parts are among COCO's 17; -1 is the neck, which lies between the shoulders.
BODY = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
FACE, LEFT_HAND, RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)

# x1, y1, x2, y2 in pixels.
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DwPose:
    boxes: Any
    points: Any


def build(folder: Path, device: Device) -> DwPose:
    return DwPose(
        boxes=open_session(folder / "yolox_l.onnx", device),
        points=open_session(folder / "dw-ll_ucoco_384.onnx", device),
    )


def dwpose(
    pictures: Sequence[Pixels], model: DwPose, *, include_body: bool, include_hand: bool, include_face: bool
) -> list[Drawn]:
    return [_dwpose(each, model, include_body, include_hand, include_face) for each in pictures]


def _dwpose(picture: Pixels, model: DwPose, body: bool, hand: bool, face: bool) -> Drawn:
    height, width = picture.shape[:2]
    people = tuple(
        _person(find_points(picture, box, model.points), (width, height), body, hand, face)
        for box in find_people(picture, model.boxes)
    )
    return Drawn(pixels=draw(people, width, height), people=people)


def find_people(picture: Pixels, session: Any) -> list[Box]:
    """Boxes around people, the surest first. The whole picture where none was found, as DWPose does."""
    height, width = picture.shape[:2]
    scale = min(BOX_SIDE_PX / height, BOX_SIDE_PX / width)
    small = cv2.resize(picture, (max(1, int(width * scale)), max(1, int(height * scale))))
    square = np.full((BOX_SIDE_PX, BOX_SIDE_PX, 3), BOX_PAD, np.uint8)
    square[: small.shape[0], : small.shape[1]] = small
    values = square[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32)
    rows = session.run(None, {session.get_inputs()[0].name: values})[0][0]
    boxes, scores = _decoded(rows)
    corners = [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for x1, y1, x2, y2 in boxes / scale]
    kept = cv2.dnn.NMSBoxes(corners, scores.tolist(), BOX_SCORE_MIN, BOX_OVERLAP_MAX)
    found = [corners[int(index)] for index in np.asarray(kept).ravel()]
    return [(x, y, x + w, y + h) for x, y, w, h in found] or [(0.0, 0.0, float(width), float(height))]


def _decoded(rows: Any) -> tuple[Any, Any]:
    """(N, 4) corners in the square's pixels and (N,) scores for people, from YOLOX's rows of its three grids."""
    grids, strides = [], []
    for stride in BOX_STRIDES:
        cells = BOX_SIDE_PX // stride
        y, x = np.mgrid[:cells, :cells]
        grids.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((cells * cells, 1), stride))
    grid, stride_of = np.concatenate(grids), np.concatenate(strides)
    centre = (rows[:, :2] + grid) * stride_of
    half = np.exp(rows[:, 2:4]) * stride_of / 2
    return np.concatenate([centre - half, centre + half], axis=1), rows[:, 4] * rows[:, 5]


def find_points(picture: Pixels, box: Box, session: Any) -> Any:
    """(133, 3): x and y in the picture's pixels, and how sure."""
    to_box, back = _transforms(box)
    crop = cv2.warpAffine(picture, to_box, (POSE_WIDTH, POSE_HEIGHT), flags=cv2.INTER_LINEAR)
    values = ((crop - np.array(POSE_MEAN)) / np.array(POSE_STD)).transpose(2, 0, 1)[None].astype(np.float32)
    rows_x, rows_y = session.run(None, {session.get_inputs()[0].name: values})[:2]
    at = np.stack([rows_x[0].argmax(axis=1), rows_y[0].argmax(axis=1)], axis=1) / POSE_SPLIT
    score = np.minimum(rows_x[0].max(axis=1), rows_y[0].max(axis=1))
    placed = np.concatenate([at, np.ones((len(at), 1))], axis=1) @ back.T
    return np.concatenate([placed, score[:, None]], axis=1)


def _transforms(box: Box) -> tuple[Any, Any]:
    """From the picture to the network's view of a box with a margin, and back."""
    x1, y1, x2, y2 = box
    width, height = (x2 - x1) * POSE_MARGIN, (y2 - y1) * POSE_MARGIN
    scale = min(POSE_WIDTH / max(width, 1.0), POSE_HEIGHT / max(height, 1.0))
    shift_x = POSE_WIDTH / 2 - (x1 + x2) / 2 * scale
    shift_y = POSE_HEIGHT / 2 - (y1 + y2) / 2 * scale
    there = np.array([[scale, 0, shift_x], [0, scale, shift_y]])
    back = np.array([[1 / scale, 0, -shift_x / scale], [0, 1 / scale, -shift_y / scale]])
    return there, back


def _person(points: Any, size: tuple[int, int], body: bool, hand: bool, face: bool) -> Person:
    seen = [_keypoint(row, size) for row in points]
    return Person(
        body=tuple(_neck(points, size) if index < 0 else seen[index] for index in BODY) if body else (),
        face=tuple(seen[FACE]) if face else (),
        left_hand=_any(seen[LEFT_HAND]) if hand else (),
        right_hand=_any(seen[RIGHT_HAND]) if hand else (),
    )


def _neck(points: Any, size: tuple[int, int]) -> Keypoint | None:
    shoulders = points[[LEFT_SHOULDER, RIGHT_SHOULDER]]
    return _keypoint((*shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()), size)


def _keypoint(row: Any, size: tuple[int, int]) -> Keypoint | None:
    x, y, score = (float(each) for each in row)
    return Keypoint(x=x / size[0], y=y / size[1], score=min(score, 1.0)) if score >= POINT_SCORE_MIN else None


def _any(points: list[Keypoint | None]) -> Keypoints:
    """A hand of which no point was seen is no hand."""
    return tuple(points) if any(points) else ()


DWPOSE = Model(name="dwpose", entry="annotator-dwpose", build=build, uses_gpu=False)

ANNOTATORS = (
    Annotator(
        id="dwpose",
        description="Bodies, hands and faces as stick figures, surer than openpose",
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
