"""Faces as MediaPipe draws them, for the ControlNet that was trained on that: its networks, read with OpenCV alone.

After MediaPipe's face detection (short range), face mesh and iris landmarks; no mediapipe is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.device import Device
from services.preprocessor.weights import Model

DETECTOR, MESH, IRIS = "face_detection_short_range.tflite", "face_landmark.tflite", "iris_landmark.tflite"
DETECTOR_SIDE_PX, MESH_SIDE_PX, IRIS_SIDE_PX = 128, 192, 64
# Cells of the detector's grids and how many anchors each has.
GRIDS = ((16, 2), (8, 6))
OVERLAP_MAX = 0.3
# Of the detected box, and of an eye, how much is looked at.
FACE_MARGIN, EYE_MARGIN = 1.5, 2.3
MESH_SCORE_MIN = 0.5
# Faces smaller than this tell a ControlNet nothing.
FACE_MIN_PX = 64
PEN_PX, PUPIL_PX = 2, 2
RIGHT_EYE_ENDS, LEFT_EYE_ENDS = (33, 133), (263, 362)

# Paths over the mesh's 468 points, and their colours in RGB.
OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152),
    *(148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109, 10),
)
PATHS = (
    (OVAL, (10, 200, 10)),
    ((263, 249, 390, 373, 374, 380, 381, 382, 362), (10, 200, 180)),
    ((263, 466, 388, 387, 386, 385, 384, 398, 362), (10, 200, 180)),
    ((276, 283, 282, 295, 285), (10, 220, 180)),
    ((300, 293, 334, 296, 336), (10, 220, 180)),
    ((33, 7, 163, 144, 145, 153, 154, 155, 133), (180, 200, 10)),
    ((33, 246, 161, 160, 159, 158, 157, 173, 133), (180, 200, 10)),
    ((46, 53, 52, 65, 55), (180, 220, 10)),
    ((70, 63, 105, 66, 107), (180, 220, 10)),
    ((61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291), (10, 180, 10)),
    ((61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291), (10, 180, 10)),
    ((78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308), (10, 180, 10)),
    ((78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308), (10, 180, 10)),
)
RIGHT_PUPIL, LEFT_PUPIL = (250, 200, 10), (10, 200, 250)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceReader:
    detector: Any
    mesh: Any
    iris: Any


def build(folder: Path, device: Device) -> FaceReader:
    return FaceReader(detector=network(folder / DETECTOR), mesh=network(folder / MESH), iris=network(folder / IRIS))


def network(path: Path) -> Any:
    """OpenCV's newer engine gives one output of several only, so the classic one reads it."""
    return cv2.dnn.readNetFromTFLite(str(path), cv2.dnn.ENGINE_CLASSIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A turned square of the picture, in pixels."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def view(self, side_px: int) -> Any:
        """The affine map (2, 3) from the picture to a view of this many pixels a side."""
        scale = side_px / max(self.side, 1.0)
        cos, sin = np.cos(self.angle) * scale, np.sin(self.angle) * scale
        half = side_px / 2
        return np.array(
            [[cos, sin, half - cos * self.x - sin * self.y], [-sin, cos, half + sin * self.x - cos * self.y]]
        )


def mediapipe_face(
    pictures: Sequence[Pixels], reader: FaceReader, *, max_faces: int, min_confidence: float
) -> list[Pixels]:
    return [_draw(each, find_faces(each, reader, max_faces, min_confidence)) for each in pictures]


def find_faces(picture: Pixels, reader: FaceReader, max_faces: int, min_confidence: float) -> list[Any]:
    """(470, 2) points each, in pixels: the mesh's 468, the right pupil and the left one. The surest face first."""
    meshes = (_mesh(picture, region, reader) for region in detect(picture, reader.detector, max_faces, min_confidence))
    return [mesh for mesh in meshes if mesh is not None and np.ptp(mesh[:468], axis=0).min() >= FACE_MIN_PX]


def detect(picture: Pixels, detector: Any, max_faces: int, min_confidence: float) -> list[Region]:
    """Around faces, turned so that the eyes are level, the surest first."""
    height, width = picture.shape[:2]
    whole = Region(x=width / 2, y=height / 2, side=max(width, height))
    there = whole.view(DETECTOR_SIDE_PX)
    rows, scores = run(detector, seen(picture, there, DETECTOR_SIDE_PX) / 127.5 - 1.0, (16, 1))
    places = rows.reshape(896, 8, 2) / DETECTOR_SIDE_PX
    anchors = _anchors()
    places[:, 0] += anchors
    places[:, 2:] += anchors[:, None]
    sure = sigmoid(scores.reshape(896))
    corners = np.concatenate([places[:, 0] - places[:, 1] / 2, places[:, 1]], axis=1)
    kept = cv2.dnn.NMSBoxes(corners.tolist(), sure.tolist(), min_confidence, OVERLAP_MAX)
    best = [int(index) for index in np.asarray(kept).ravel()][:max_faces]
    back = cv2.invertAffineTransform(there)
    return [_region(places[index] * DETECTOR_SIDE_PX, back, whole.side) for index in best]


def _anchors() -> Any:
    """(896, 2) centres of the detector's cells, in parts of its view."""
    centres = []
    for cells, anchors in GRIDS:
        y, x = np.mgrid[:cells, :cells]
        centre = (np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) / cells
        centres.append(np.repeat(centre, anchors, axis=0))
    return np.concatenate(centres)


def _region(places: Any, back: Any, side: float) -> Region:
    """Around a detected box, turned so that the eyes are level."""
    (x, y), right, left = moved(places[[0, 2, 3]], back)
    dx, dy = left - right
    size = places[1].max() / DETECTOR_SIDE_PX * side
    return Region(x=float(x), y=float(y), side=float(size * FACE_MARGIN), angle=float(np.arctan2(dy, dx)))


def _mesh(picture: Pixels, region: Region, reader: FaceReader) -> Any:
    there = region.view(MESH_SIDE_PX)
    points, score = run(reader.mesh, seen(picture, there, MESH_SIDE_PX) / 255.0, (1404, 1))
    if sigmoid(score).item() < MESH_SCORE_MIN:
        return None
    placed = moved(points.reshape(468, 3)[:, :2], cv2.invertAffineTransform(there))
    right = _pupil(picture, placed[list(RIGHT_EYE_ENDS)], reader, region.angle, flips=True)
    left = _pupil(picture, placed[list(LEFT_EYE_ENDS)], reader, region.angle, flips=False)
    return np.concatenate([placed, [right, left]])


def _pupil(picture: Pixels, ends: Any, reader: FaceReader, angle: float, *, flips: bool) -> Any:
    """Where the eye between two corners looks from; the network knows left eyes, so right ones are mirrored."""
    x, y = ends.mean(axis=0)
    eye = Region(x=float(x), y=float(y), side=float(np.linalg.norm(ends[0] - ends[1])) * EYE_MARGIN, angle=angle)
    there = eye.view(IRIS_SIDE_PX)
    view = seen(picture, there, IRIS_SIDE_PX) / 255.0
    _, iris = run(reader.iris, view[:, ::-1] if flips else view, (213, 15))
    point = iris.reshape(5, 3)[0, :2]
    if flips:
        point = np.array([IRIS_SIDE_PX - point[0], point[1]])
    return moved(point[None], cv2.invertAffineTransform(there))[0]


def seen(picture: Pixels, there: Any, side_px: int) -> Any:
    return cv2.warpAffine(picture, there, (side_px, side_px), flags=cv2.INTER_LINEAR).astype(np.float32)


def forward(net: Any, values: Any) -> Sequence[Any]:
    """Every output for a view (H, W, 3) of the picture."""
    net.setInput(np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32))
    outputs: Sequence[Any] = net.forward(net.getUnconnectedOutLayersNames())
    return outputs


def run(net: Any, values: Any, lengths: tuple[int, int]) -> tuple[Any, Any]:
    """The two outputs whose last or second axes have these lengths."""
    outputs = forward(net, values)
    first, second = (next(each for each in outputs if length in each.shape[1:]) for length in lengths)
    return first, second


def sigmoid(values: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(values.astype(np.float64), -100, 100)))


def moved(points: Any, transform: Any) -> Any:
    return points @ transform[:, :2].T + transform[:, 2]


def _draw(picture: Pixels, faces: Sequence[Any]) -> Pixels:
    """(H, W, 3) on black."""
    canvas = np.zeros((*picture.shape[:2], 3), np.uint8)
    for face in faces:
        points = np.floor(face).astype(int)
        for path, colour in PATHS:
            cv2.polylines(canvas, [points[list(path)].reshape(-1, 1, 2)], False, colour, PEN_PX)
        for (x, y), colour in zip(points[468:], (RIGHT_PUPIL, LEFT_PUPIL), strict=True):
            canvas[max(0, y - PUPIL_PX) : max(0, y + PUPIL_PX), max(0, x - PUPIL_PX) : max(0, x + PUPIL_PX)] = colour
    return canvas


FACES = Model(name="mediapipe_face", entry="annotator-mediapipe-face", build=build, uses_gpu=False)

MEDIAPIPE_FACE = Annotator(
    id="mediapipe_face",
    description="Faces: outline, eyes, brows, mouth and pupils",
    apply=mediapipe_face,
    models=(FACES,),
    detect_resolution=512,
    parameters=(
        Parameter(name="max_faces", default=1, minimum=1, maximum=10, description="At most this many, the surest"),
        Parameter(name="min_confidence", default=0.5, minimum=0, maximum=1, description="Less sure faces are dropped"),
    ),
)
