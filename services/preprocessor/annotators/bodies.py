"""Bodies by MediaPipe's pose landmarks (BlazePose, Bazarevsky et al. 2020), drawn for the openpose ControlNet.

The network runs in OpenCV. OpenCV cannot read MediaPipe's own person detector, so a body is searched for below each
face. From there on each result gives the region for the next one, as MediaPipe tracks people in videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, ControlMap, Pixels
from services.preprocessor.annotators.faces import (
    DETECTOR,
    FACE_MARGIN,
    Region,
    detect,
    forward,
    read_network,
    sigmoid,
    transform,
    warp,
)
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.poses import Keypoint, Person, draw
from services.preprocessor.weights import AnnotatorWeights

LANDMARKS = "pose_landmark_full.tflite"
SIDE_PX = 256
# 33 points of a body, two that locate it, and four of its hands; each has x, y, z, visibility and presence.
POINTS, VALUES = 39, 5
HIPS, TOP = 33, 34
# In multiples of a face's size: how far below it the hips are, and the side of the region that is searched first.
HIPS_BELOW_FACE, BODY_OF_FACE = 3.0, 8.0
# The side of the next region, as a multiple of the diameter of the circle that the two locating points give.
BODY_MARGIN = 1.25
PASSES = 3
# The point of each of OpenPose's 18 parts; the neck is the middle of the two shoulders.
LEFT_SHOULDER, RIGHT_SHOULDER = 11, 12
NECK = (LEFT_SHOULDER, RIGHT_SHOULDER)
PARTS = (0, NECK, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyNetworks:
    """OpenCV networks."""

    faces: Any
    landmarks: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLandmarks:
    """Points (39, 2) in pixels, the confidence of each (39,), and of there being a body at all; 0 to 1."""

    points: Any
    confidence: Any
    score: float


def build(folder: Path, device: AnnotatorDevice) -> BodyNetworks:
    return BodyNetworks(faces=read_network(folder / DETECTOR), landmarks=read_network(folder / LANDMARKS))


def mediapipe_pose(
    images: Sequence[Pixels], networks: BodyNetworks, *, max_people: int, min_confidence: float
) -> list[ControlMap]:
    """A map (H, W, 3) uint8 of each image (H, W, 3), with the people in it."""
    return [_draw(each, find_people(each, networks, max_people, min_confidence)) for each in images]


def _draw(image: Pixels, people: tuple[Person, ...]) -> ControlMap:
    height, width = image.shape[:2]
    return ControlMap(pixels=draw(people, width, height), people=people)


def find_people(image: Pixels, networks: BodyNetworks, at_most: int, min_confidence: float) -> tuple[Person, ...]:
    """People in an image (H, W, 3) uint8, those with the most confident faces first."""
    height, width = image.shape[:2]
    faces = detect(image, networks.faces, at_most, min_confidence)
    found = (_track(image, _below(face), networks) for face in faces)
    return tuple(_person(each, (width, height), min_confidence) for each in found if each.score >= min_confidence)


def _below(face: Region) -> Region:
    """The region where a face's body should be."""
    size = face.side / FACE_MARGIN
    down_x, down_y = -np.sin(face.angle), np.cos(face.angle)
    return Region(
        x=float(face.x + HIPS_BELOW_FACE * size * down_x),
        y=float(face.y + HIPS_BELOW_FACE * size * down_y),
        side=size * BODY_OF_FACE,
        angle=face.angle,
    )


def _track(image: Pixels, start: Region, networks: BodyNetworks) -> BodyLandmarks:
    """The last of several passes over an image (H, W, 3); each searches the region that the one before gives."""
    found = _find_landmarks(image, start, networks)
    for _ in range(PASSES - 1):
        x, y = found.points[HIPS]
        dx, dy = found.points[TOP] - found.points[HIPS]
        side = 2 * np.hypot(dx, dy) * BODY_MARGIN
        around = Region(x=float(x), y=float(y), side=float(side), angle=float(np.arctan2(dy, dx) + np.pi / 2))
        found = _find_landmarks(image, around, networks)
    return found


def _find_landmarks(image: Pixels, region: Region, networks: BodyNetworks) -> BodyLandmarks:
    """The landmarks of the body in a region of an image (H, W, 3) uint8."""
    to_view = region.view(SIDE_PX)
    outputs = forward(networks.landmarks, warp(image, to_view, SIDE_PX) / 255.0)
    values, score = (next(each for each in outputs if each.size == size) for size in (POINTS * VALUES, 1))
    rows = values.reshape(POINTS, VALUES)
    placed = transform(rows[:, :2], cv2.invertAffineTransform(to_view))
    # The score is a probability already; visibility and presence are logits.
    return BodyLandmarks(points=placed, confidence=sigmoid(rows[:, 3:]).min(axis=1), score=float(score.item()))


def _person(found: BodyLandmarks, size: tuple[int, int], min_confidence: float) -> Person:
    return Person(body=tuple(_keypoint(found, part, size, min_confidence) for part in PARTS))


def _keypoint(
    found: BodyLandmarks, part: int | tuple[int, int], size: tuple[int, int], min_confidence: float
) -> Keypoint | None:
    """The middle of two points for a part made of two. None outside the image, or below the confidence."""
    chosen = list(part) if isinstance(part, tuple) else [part]
    x, y = found.points[chosen].mean(axis=0) / size
    score = float(found.confidence[chosen].min())
    if score < min_confidence or not (0 <= x < 1 and 0 <= y < 1):
        return None
    return Keypoint(x=float(x), y=float(y), score=score)


BODIES = AnnotatorWeights(name="mediapipe_pose", entry="annotator-mediapipe-pose", build=build, uses_gpu=False)

MEDIAPIPE_POSE = Annotator(
    id="mediapipe_pose",
    description="Bodies as stick figures, of people whose faces are visible; without torch",
    apply=mediapipe_pose,
    controlnets=("openpose",),
    models=(BODIES,),
    detect_resolution=512,
    parameters=(
        Parameter(
            name="max_people",
            default=1,
            minimum=1,
            maximum=10,
            description="At most this many people, the most confident first",
        ),
        Parameter(
            name="min_confidence",
            default=0.5,
            minimum=0,
            maximum=1,
            description="Less confident people and points are dropped",
        ),
    ),
)
