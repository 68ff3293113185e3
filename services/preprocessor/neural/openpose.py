"""People by OpenPose (Cao et al. 2017), with the networks of controlnet_aux; drawn here, and told as JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Drawn, Pixels
from services.preprocessor.device import Device
from services.preprocessor.neural import defects
from services.preprocessor.neural.running import TORCH, place, running
from services.preprocessor.poses import Keypoint, Keypoints, Person, draw
from services.preprocessor.weights import Model

# So many times as high as wide, a picture shows nobody: the network for bodies sees it 184 pixels high, and 2 wide.
TALLEST = 92


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPose:
    detector: Any
    device: Device


def build(folder: Path, device: Device) -> OpenPose:
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
    pictures: Sequence[Pixels], model: OpenPose, *, include_body: bool, include_hand: bool, include_face: bool
) -> list[Drawn]:
    return [_openpose(each, model, include_body, include_hand, include_face) for each in pictures]


def _openpose(picture: Pixels, model: OpenPose, body: bool, hand: bool, face: bool) -> Drawn:
    height, width = picture.shape[:2]
    with running(model.device):
        found = model.detector.detect_poses(picture, hand, face) if height <= TALLEST * width else []
    people = tuple(
        Person(
            body=_points(pose.body.keypoints) if body else (),
            face=_points(pose.face),
            left_hand=_points(pose.left_hand),
            right_hand=_points(pose.right_hand),
        )
        for pose in found
    )
    return Drawn(pixels=draw(people, width, height), people=people)


def _points(points: Iterable[Any] | None) -> Keypoints:
    """Points outside the picture stand for none. Those of hands and faces come as numpy's numbers."""
    return tuple(
        None
        if point is None or point.x < 0 or point.y < 0
        else Keypoint(x=float(point.x), y=float(point.y), score=float(point.score))
        for point in points or ()
    )


OPENPOSE = Model(name="openpose", entry="annotator-openpose", build=build)
PARTS = (
    Parameter(name="include_body", default=True, description="Draw bodies"),
    Parameter(name="include_hand", default=False, description="Look for hands and draw them"),
    Parameter(name="include_face", default=False, description="Look for faces and draw them"),
)


def _annotator(annotator_id: str, description: str, parts: tuple[bool, bool, bool] | None = None) -> Annotator:
    """`parts` says whether bodies, hands and faces are looked for; without it the request does."""
    fixed: dict[str, Any] = dict(zip((part.name for part in PARTS), parts, strict=True)) if parts else {}
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(openpose, **fixed),
        parameters=() if fixed else PARTS,
        controlnets=("openpose",),
        models=(OPENPOSE,),
        needs=(*TORCH, "torchvision", "scipy", "skimage"),
        license="non-commercial: see the license of OpenPose",
        detect_resolution=512,
    )


ANNOTATORS = (
    _annotator("openpose", "Bodies as stick figures"),
    _annotator("openpose_face", "Bodies and faces", (True, False, True)),
    _annotator("openpose_faceonly", "Faces alone", (False, False, True)),
    _annotator("openpose_full", "Bodies, hands and faces", (True, True, True)),
    _annotator("openpose_hand", "Hands alone", (False, True, False)),
)
