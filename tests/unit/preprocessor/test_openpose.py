"""What OpenPose detects becomes a drawing and JSON. The detector is a fake, without a network."""

import json
from types import SimpleNamespace

import numpy as np

from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.neural.pose_estimation import OpenPose, openpose
from services.preprocessor.poses import to_json


def point(x: float, y: float) -> SimpleNamespace:
    """With numpy's numbers, as OpenPose gives hands and faces."""
    return SimpleNamespace(x=np.float32(x), y=np.float32(y), score=1.0)


class FakeDetector:
    def detect_poses(self, image, include_hand, include_face):
        body = SimpleNamespace(keypoints=[point(0.5, 0.25), *[None] * 17])
        hand = [point(0.25, 0.5), *[point(-1 / 64, -1 / 64)] * 20]
        face = [point(0.75, 0.25)] * 70
        return [
            SimpleNamespace(
                body=body,
                left_hand=hand if include_hand else None,
                right_hand=None,
                face=face if include_face else None,
            )
        ]


def found(**parts: bool) -> tuple[dict, np.ndarray]:
    model = OpenPose(detector=FakeDetector(), device=AnnotatorDevice())
    settings = {"include_body": True, "include_hand": False, "include_face": False} | parts
    (drawn,) = openpose([np.zeros((64, 64, 3), np.uint8)], model, **settings)
    pose_json = to_json(drawn.people, canvas=(64, 64), inner=(64, 64), offset=(0, 0))
    return json.loads(pose_json)["people"][0], drawn.pixels


def test_hands_and_faces_are_in_pixels_and_drawn():
    person, pixels = found(include_hand=True, include_face=True)
    assert person["pose_keypoints_2d"][:3] == [32, 16, 1]
    assert person["hand_left_keypoints_2d"][:3] == [16, 32, 1]
    assert person["face_keypoints_2d"][:3] == [48, 16, 1]
    assert pixels[32, 16].any()
    assert pixels[16, 48].all()


def test_points_outside_the_image_are_none():
    person, _ = found(include_hand=True)
    assert person["hand_left_keypoints_2d"][3:] == [0] * 60


def test_no_people_are_detected_in_an_image_too_thin_for_the_network():
    class BrokenDetector:
        def detect_poses(self, image, include_hand, include_face):
            raise RuntimeError("two pixels are too few")

    model = OpenPose(detector=BrokenDetector(), device=AnnotatorDevice())
    parts = {"include_body": True, "include_hand": False, "include_face": False}
    (drawn,) = openpose([np.zeros((8192, 64, 3), np.uint8)], model, **parts)
    assert drawn.people == ()
    assert not drawn.pixels.any()


def test_parts_that_were_not_requested_are_left_out():
    person, pixels = found(include_body=False, include_face=True)
    assert person["pose_keypoints_2d"] == person["hand_left_keypoints_2d"] == []
    assert not pixels[16, 32].any()
