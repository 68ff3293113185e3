"""Faces as MediaPipe draws them, for the ControlNet that was trained on such maps; its networks run in OpenCV.

After MediaPipe (https://github.com/google-ai-edge/mediapipe): face detection of short range (BlazeFace, Bazarevsky et
al. 2019), face mesh and iris landmarks. The package mediapipe is not needed. All points here are (x, y).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.weights import AnnotatorWeights, answers_of

DETECTOR, MESH, IRIS = "face_detection_short_range.tflite", "face_landmark.tflite", "iris_landmark.tflite"
DETECTOR_SIDE_PX, MESH_SIDE_PX, IRIS_SIDE_PX = 128, 192, 64
# Cells per side of the detector's two grids, and how many anchors each cell has.
GRIDS = ((16, 2), (8, 6))
OVERLAP_MAX = 0.3
# The side of the region that a network gets, as a multiple of the detected face's and of the eye's width.
FACE_MARGIN, EYE_MARGIN = 1.5, 2.3
MESH_SCORE_MIN = 0.5
# Smaller faces give a ControlNet no information.
FACE_MIN_PX = 64
PEN_PX, PUPIL_PX = 2, 2
RIGHT_EYE_ENDS, LEFT_EYE_ENDS = (33, 133), (263, 362)

# Paths over the mesh's 468 points, and their colors in RGB.
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
class FaceNetworks:
    """OpenCV networks."""

    detector: Any
    mesh: Any
    iris: Any


def build(folder: Path, device: AnnotatorDevice) -> FaceNetworks:
    return FaceNetworks(
        detector=read_network(folder / DETECTOR),
        mesh=read_network(folder / MESH),
        iris=read_network(folder / IRIS),
    )


def read_network(path: Path) -> Any:
    """With OpenCV's classic engine: the newer one returns only one of several outputs."""
    return cv2.dnn.readNetFromTFLite(str(path), cv2.dnn.ENGINE_CLASSIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A rotated square of the image: center and side in pixels, angle in radians."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def view(self, side_px: int) -> Any:
        """The affine map (2, 3) float64 from the image's pixels to those of a view (side_px, side_px) of the region."""
        scale = side_px / max(self.side, 1.0)
        cos, sin = np.cos(self.angle) * scale, np.sin(self.angle) * scale
        half = side_px / 2
        return np.array(
            [[cos, sin, half - cos * self.x - sin * self.y], [-sin, cos, half + sin * self.x - cos * self.y]]
        )


def mediapipe_face(
    images: Sequence[Pixels], networks: FaceNetworks, *, max_faces: int, min_confidence: float
) -> list[Pixels]:
    """A map (H, W, 3) uint8 of each image (H, W, 3): the faces' lines on black."""
    return [_draw(each, find_faces(each, networks, max_faces, min_confidence)) for each in images]


def find_faces(image: Pixels, networks: FaceNetworks, max_faces: int, min_confidence: float) -> list[Any]:
    """(470, 2) float64 for each face of an image (H, W, 3): the mesh's 468 points, the right pupil and the left one.

    The most confident face first.
    """
    meshes = (_mesh(image, region, networks) for region in detect(image, networks.detector, max_faces, min_confidence))
    return [mesh for mesh in meshes if mesh is not None and np.ptp(mesh[:468], axis=0).min() >= FACE_MIN_PX]


def detect(image: Pixels, detector: Any, max_faces: int, min_confidence: float) -> list[Region]:
    """Around the faces of an image (H, W, 3) uint8, rotated so that the eyes are level, the most confident first."""
    height, width = image.shape[:2]
    whole = Region(x=width / 2, y=height / 2, side=max(width, height))
    to_view = whole.view(DETECTOR_SIDE_PX)
    rows, scores = run(detector, warp(image, to_view, DETECTOR_SIDE_PX) / 127.5 - 1.0, (16, 1))
    places = rows.reshape(896, 8, 2) / DETECTOR_SIDE_PX
    anchors = _anchors()
    places[:, 0] += anchors
    places[:, 2:] += anchors[:, None]
    sure = sigmoid(scores.reshape(896))
    corners = np.concatenate([places[:, 0] - places[:, 1] / 2, places[:, 1]], axis=1)
    kept = cv2.dnn.NMSBoxes(corners.tolist(), sure.tolist(), min_confidence, OVERLAP_MAX)
    best = [int(index) for index in np.asarray(kept).ravel()][:max_faces]
    back = cv2.invertAffineTransform(to_view)
    return [_region(places[index] * DETECTOR_SIDE_PX, back, whole.side) for index in best]


def _anchors() -> Any:
    """(896, 2) float64, 0 to 1: the centers of the detector's cells as fractions of its view."""
    centers = []
    for cells, anchors in GRIDS:
        y, x = np.mgrid[:cells, :cells]
        center = (np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) / cells
        centers.append(np.repeat(center, anchors, axis=0))
    return np.concatenate(centers)


def _region(places: Any, back: Any, side: float) -> Region:
    """The region around one detection, rotated so that the eyes are level.

    `places` (8, 2) are the box's center, its size and six keypoints in the view's pixels; `back` (2, 3) maps the view
    to the image, whose longer side is `side`.
    """
    (x, y), right, left = transform(places[[0, 2, 3]], back)
    dx, dy = left - right
    size = places[1].max() / DETECTOR_SIDE_PX * side
    return Region(x=float(x), y=float(y), side=float(size * FACE_MARGIN), angle=float(np.arctan2(dy, dx)))


def _mesh(image: Pixels, region: Region, networks: FaceNetworks) -> Any:
    """(470, 2) float64 points of the face in a region of an image (H, W, 3); None if it shows no face."""
    to_view = region.view(MESH_SIDE_PX)
    points, score = run(networks.mesh, warp(image, to_view, MESH_SIDE_PX) / 255.0, (1404, 1))
    if sigmoid(score).item() < MESH_SCORE_MIN:
        return None
    placed = transform(points.reshape(468, 3)[:, :2], cv2.invertAffineTransform(to_view))
    right = _pupil(image, placed[list(RIGHT_EYE_ENDS)], networks, region.angle, flips=True)
    left = _pupil(image, placed[list(LEFT_EYE_ENDS)], networks, region.angle, flips=False)
    return np.concatenate([placed, [right, left]])


def _pupil(image: Pixels, ends: Any, networks: FaceNetworks, angle: float, *, flips: bool) -> Any:
    """(2,) float64: the pupil of the eye between two corners `ends` (2, 2).

    The network was trained on left eyes, so right ones are mirrored (`flips`).
    """
    x, y = ends.mean(axis=0)
    eye = Region(x=float(x), y=float(y), side=float(np.linalg.norm(ends[0] - ends[1])) * EYE_MARGIN, angle=angle)
    to_view = eye.view(IRIS_SIDE_PX)
    view = warp(image, to_view, IRIS_SIDE_PX) / 255.0
    _, iris = run(networks.iris, view[:, ::-1] if flips else view, (213, 15))
    point = iris.reshape(5, 3)[0, :2]
    if flips:
        point = np.array([IRIS_SIDE_PX - point[0], point[1]])
    return transform(point[None], cv2.invertAffineTransform(to_view))[0]


def warp(image: Pixels, to_view: Any, side_px: int) -> Any:
    """(side_px, side_px, 3) float32, 0 to 255: the view of an image (H, W, 3) uint8 by an affine map (2, 3)."""
    return cv2.warpAffine(image, to_view, (side_px, side_px), flags=cv2.INTER_LINEAR).astype(np.float32)


def forward(net: Any, values: Any) -> Sequence[Any]:
    """Every output (1, ...) float32 of a network for a view (H, W, 3), in the network's own range of values."""
    net.setInput(np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32))
    return answers_of(net.forward(net.getUnconnectedOutLayersNames()))


def run(net: Any, values: Any, lengths: tuple[int, int]) -> tuple[Any, Any]:
    """The two outputs that have an axis of these lengths, batch axis excluded."""
    outputs = forward(net, values)
    first, second = (next(each for each in outputs if length in each.shape[1:]) for length in lengths)
    return first, second


def sigmoid(values: Any) -> Any:
    """float64, 0 to 1, in the shape (...,) of the values."""
    return 1 / (1 + np.exp(-np.clip(values.astype(np.float64), -100, 100)))


def transform(points: Any, affine: Any) -> Any:
    """Points (N, 2) by an affine map (2, 3)."""
    return points @ affine[:, :2].T + affine[:, 2]


def _draw(image: Pixels, faces: Sequence[Any]) -> Pixels:
    """(H, W, 3) uint8 on black: the lines and pupils of faces (470, 2)."""
    canvas = np.zeros((*image.shape[:2], 3), np.uint8)
    for face in faces:
        points = np.floor(face).astype(int)
        for path, color in PATHS:
            cv2.polylines(canvas, [points[list(path)].reshape(-1, 1, 2)], False, color, PEN_PX)
        for (x, y), color in zip(points[468:], (RIGHT_PUPIL, LEFT_PUPIL), strict=True):
            canvas[max(0, y - PUPIL_PX) : max(0, y + PUPIL_PX), max(0, x - PUPIL_PX) : max(0, x + PUPIL_PX)] = color
    return canvas


FACES = AnnotatorWeights(name="mediapipe_face", entry="annotator-mediapipe-face", build=build, uses_gpu=False)

MEDIAPIPE_FACE = Annotator(
    id="mediapipe_face",
    description="Faces: outline, eyes, brows, mouth and pupils",
    apply=mediapipe_face,
    models=(FACES,),
    detect_resolution=512,
    parameters=(
        Parameter(
            name="max_faces",
            default=1,
            minimum=1,
            maximum=10,
            description="At most this many faces, the most confident first",
        ),
        Parameter(
            name="min_confidence", default=0.5, minimum=0, maximum=1, description="Less confident faces are dropped"
        ),
    ),
)
