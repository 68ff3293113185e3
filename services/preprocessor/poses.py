"""People detected in an image: drawn as the OpenPose ControlNet expects them, and written as OpenPose's JSON.

Keypoints are fractions of the image's width and height, 0 to 1. Knows no network.
"""

import colorsys
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
from cv2.typing import MatLike


@dataclass(frozen=True, slots=True, kw_only=True)
class Keypoint:
    x: float
    y: float
    score: float = 1.0


# None for a part that was not detected.
Keypoints: TypeAlias = tuple[Keypoint | None, ...]

BODY_PARTS, FACE_PARTS, HAND_PARTS = 18, 70, 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """18 points of the body (COCO's and a neck), up to 70 of the face, 21 of each hand; empty if not requested."""

    body: Keypoints = ()
    face: Keypoints = ()
    left_hand: Keypoints = ()
    right_hand: Keypoints = ()


# Pairs of body parts by number, in the order in which OpenPose's renderer draws them.
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
BONES = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, HAND_PARTS))
# The color circle in eighteen steps, one for each part of the body.
COLORS = tuple(
    tuple(round(part * 255) for part in colorsys.hsv_to_rgb(step / BODY_PARTS, 1.0, 1.0)) for step in range(BODY_PARTS)
)
STICK_PX, JOINT_PX, FACE_PX = 4, 4, 3


def draw(people: Sequence[Person], width_px: int, height_px: int) -> MatLike:
    """(H, W, 3) uint8 RGB on black, 0 to 255; parts without points are not drawn.

    As controlnet_aux's open_pose.util draws bodies, hands and faces, without its matplotlib.
    """
    canvas = np.zeros((height_px, width_px, 3), np.uint8)
    for person in people:
        _draw_body(canvas, person.body)
        _draw_hand(canvas, person.left_hand)
        _draw_hand(canvas, person.right_hand)
        for x, y in _to_pixels(canvas, person.face):
            cv2.circle(canvas, (x, y), FACE_PX, (255, 255, 255), thickness=-1)
    return canvas


def _draw_body(canvas: MatLike, body: Keypoints) -> None:
    height, width = canvas.shape[:2]
    if not body:
        return
    for (start, end), color in zip(LIMBS, COLORS, strict=False):
        first, second = body[start], body[end]
        if first is None or second is None:
            continue
        x1, y1, x2, y2 = first.x * width, first.y * height, second.x * width, second.y * height
        middle = (int((x1 + x2) / 2), int((y1 + y2) / 2))
        axes = (int(math.hypot(x1 - x2, y1 - y2) / 2), STICK_PX)
        angle = int(math.degrees(math.atan2(y1 - y2, x1 - x2)))
        limb = np.array(cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1))
        cv2.fillConvexPoly(canvas, limb, [int(part * 0.6) for part in color])
    for point, color in zip(body, COLORS, strict=True):
        if point is not None:
            cv2.circle(canvas, (int(point.x * width), int(point.y * height)), JOINT_PX, color, thickness=-1)


def _draw_hand(canvas: MatLike, hand: Keypoints) -> None:
    if not hand:
        return
    for number, (start, end) in enumerate(BONES):
        ends = _to_pixels(canvas, (hand[start], hand[end]))
        if len(ends) == 2:
            red, green, blue = colorsys.hsv_to_rgb(number / len(BONES), 1.0, 1.0)
            cv2.line(canvas, ends[0], ends[1], (red * 255, green * 255, blue * 255), thickness=2)
    for x, y in _to_pixels(canvas, hand):
        cv2.circle(canvas, (x, y), JOINT_PX, (0, 0, 255), thickness=-1)


def _to_pixels(canvas: MatLike, points: Keypoints) -> list[tuple[int, int]]:
    """In pixels; points on the left or upper edge count as not detected, as in OpenPose."""
    height, width = canvas.shape[:2]
    placed = [(int(point.x * width), int(point.y * height)) for point in points if point is not None]
    return [(x, y) for x, y in placed if x > 0 and y > 0]


def to_json(
    people: Sequence[Person], *, canvas: tuple[int, int], inner: tuple[int, int], offset: tuple[int, int]
) -> str:
    """OpenPose's JSON in pixels of the control image: x, y, confidence of each part; zeros if it was not detected."""

    def flatten(points: Keypoints) -> list[float]:
        rows = [(0.0, 0.0, 0.0) if each is None else _in_canvas(each, inner, offset) for each in points]
        return [round(number, 3) for row in rows for number in row]

    rows: list[dict[str, Any]] = [
        {
            "pose_keypoints_2d": flatten(person.body),
            "face_keypoints_2d": flatten(person.face),
            "hand_left_keypoints_2d": flatten(person.left_hand),
            "hand_right_keypoints_2d": flatten(person.right_hand),
        }
        for person in people
    ]
    return json.dumps({"people": rows, "canvas_width": canvas[0], "canvas_height": canvas[1]}, separators=(",", ":"))


def _in_canvas(point: Keypoint, inner: tuple[int, int], offset: tuple[int, int]) -> tuple[float, float, float]:
    return point.x * inner[0] + offset[0], point.y * inner[1] + offset[1], point.score
