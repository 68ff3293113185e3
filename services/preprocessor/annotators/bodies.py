"""Bodies as MediaPipe's pose landmarks tell them, drawn for the openpose ControlNet; read with OpenCV alone.

MediaPipe's own detector of people is none that OpenCV reads, so a body is looked for below each face. From there on
each look says where to look next, as MediaPipe follows people in videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Drawn, Pixels
from services.preprocessor.annotators.faces import (
    DETECTOR,
    FACE_MARGIN,
    Region,
    detect,
    forward,
    moved,
    network,
    seen,
    sigmoid,
)
from services.preprocessor.device import Device
from services.preprocessor.poses import Keypoint, Person, draw
from services.preprocessor.weights import Model

LANDMARKS = "pose_landmark_full.tflite"
SIDE_PX = 256
# 33 points of a body, two that say where it is, and four of its hands; x, y, z, how visible, how present.
POINTS, VALUES = 39, 5
HIPS, TOP = 33, 34
# From a face, in its own size: how far below it the hips are, and how much is looked at.
HIPS_BELOW_FACE, BODY_OF_FACE = 3.0, 8.0
# Of the circle that the two points tell, how much is looked at.
BODY_MARGIN = 1.25
LOOKS = 3
# Where OpenPose's 18 parts are; the neck, which lies between the shoulders, is made of two.
LEFT_SHOULDER, RIGHT_SHOULDER = 11, 12
NECK = (LEFT_SHOULDER, RIGHT_SHOULDER)
PARTS = (0, NECK, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyReader:
    faces: Any
    landmarks: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """(39, 2) points in pixels, how sure each is, and whether there is a body at all."""

    points: Any
    sure: Any
    score: float


def build(folder: Path, device: Device) -> BodyReader:
    return BodyReader(faces=network(folder / DETECTOR), landmarks=network(folder / LANDMARKS))


def mediapipe_pose(
    pictures: Sequence[Pixels], reader: BodyReader, *, max_people: int, min_confidence: float
) -> list[Drawn]:
    return [_draw(each, find_people(each, reader, max_people, min_confidence)) for each in pictures]


def _draw(picture: Pixels, people: tuple[Person, ...]) -> Drawn:
    height, width = picture.shape[:2]
    return Drawn(pixels=draw(people, width, height), people=people)


def find_people(picture: Pixels, reader: BodyReader, at_most: int, min_confidence: float) -> tuple[Person, ...]:
    height, width = picture.shape[:2]
    faces = detect(picture, reader.faces, at_most, min_confidence)
    looks = (_look_closer(picture, _below(face), reader) for face in faces)
    return tuple(_person(look, (width, height), min_confidence) for look in looks if look.score >= min_confidence)


def _below(face: Region) -> Region:
    """Where a face's body should be."""
    size = face.side / FACE_MARGIN
    down_x, down_y = -np.sin(face.angle), np.cos(face.angle)
    return Region(
        x=float(face.x + HIPS_BELOW_FACE * size * down_x),
        y=float(face.y + HIPS_BELOW_FACE * size * down_y),
        side=size * BODY_OF_FACE,
        angle=face.angle,
    )


def _look_closer(picture: Pixels, start: Region, reader: BodyReader) -> Look:
    """The last of several looks, each where the one before says that the body is."""
    look = _look(picture, start, reader)
    for _ in range(LOOKS - 1):
        x, y = look.points[HIPS]
        dx, dy = look.points[TOP] - look.points[HIPS]
        side = 2 * np.hypot(dx, dy) * BODY_MARGIN
        around = Region(x=float(x), y=float(y), side=float(side), angle=float(np.arctan2(dy, dx) + np.pi / 2))
        look = _look(picture, around, reader)
    return look


def _look(picture: Pixels, region: Region, reader: BodyReader) -> Look:
    there = region.view(SIDE_PX)
    outputs = forward(reader.landmarks, seen(picture, there, SIDE_PX) / 255.0)
    values, score = (next(each for each in outputs if each.size == size) for size in (POINTS * VALUES, 1))
    rows = values.reshape(POINTS, VALUES)
    placed = moved(rows[:, :2], cv2.invertAffineTransform(there))
    # The score is a probability already, what tells of single points is not.
    return Look(points=placed, sure=sigmoid(rows[:, 3:]).min(axis=1), score=float(score.item()))


def _person(look: Look, size: tuple[int, int], min_confidence: float) -> Person:
    return Person(body=tuple(_keypoint(look, part, size, min_confidence) for part in PARTS))


def _keypoint(look: Look, part: int | tuple[int, int], size: tuple[int, int], min_confidence: float) -> Keypoint | None:
    """None outside the picture, and where it is not sure enough; between two where it is made of two."""
    chosen = list(part) if isinstance(part, tuple) else [part]
    x, y = look.points[chosen].mean(axis=0) / size
    score = float(look.sure[chosen].min())
    if score < min_confidence or not (0 <= x < 1 and 0 <= y < 1):
        return None
    return Keypoint(x=float(x), y=float(y), score=score)


BODIES = Model(name="mediapipe_pose", entry="annotator-mediapipe-pose", build=build, uses_gpu=False)

MEDIAPIPE_POSE = Annotator(
    id="mediapipe_pose",
    description="Bodies as stick figures, those whose faces are seen; without torch",
    apply=mediapipe_pose,
    controlnets=("openpose",),
    models=(BODIES,),
    detect_resolution=512,
    parameters=(
        Parameter(name="max_people", default=1, minimum=1, maximum=10, description="At most this many, the surest"),
        Parameter(
            name="min_confidence", default=0.5, minimum=0, maximum=1, description="Less sure people and points go"
        ),
    ),
)
