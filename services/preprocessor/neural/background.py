"""The picture without its background: the networks of rembg, pinned, read with ONNX Runtime."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.device import Device
from services.preprocessor.neural.onnx_session import open_session
from services.preprocessor.weights import Model

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutter:
    session: Any
    side_px: int
    mean: Triple
    std: Triple


def build(folder: Path, device: Device, *, file: str, side_px: int, mean: Triple, std: Triple) -> Cutter:
    return Cutter(session=open_session(folder / file, device), side_px=side_px, mean=mean, std=std)


def remove_background(pictures: Sequence[Pixels], cutter: Cutter) -> list[Pixels]:
    """(H, W, 4): the picture, transparent where it is background."""
    return [np.dstack([each, _mask(each, cutter)]) for each in pictures]


def _mask(picture: Pixels, cutter: Cutter) -> Pixels:
    """(H, W), 255 in the foreground."""
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (cutter.side_px, cutter.side_px), interpolation=cv2.INTER_LANCZOS4)
    values = small / max(int(small.max()), 1)
    values = ((values - np.array(cutter.mean)) / np.array(cutter.std)).transpose(2, 0, 1)[None].astype(np.float32)
    name = cutter.session.get_inputs()[0].name
    seen = cutter.session.run(None, {name: values})[0][0, 0]
    spread = (seen - seen.min()) / max(float(seen.max() - seen.min()), np.finfo(np.float32).tiny)
    mask = np.clip(spread * 255, 0, 255).astype(np.uint8)
    whole: Pixels = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LANCZOS4)
    return whole


U2NET = Model(
    name="u2net",
    entry="annotator-u2net",
    build=partial(build, file="u2net.onnx", side_px=320, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    uses_gpu=False,
)
ISNET = Model(
    name="isnet-general-use",
    entry="annotator-isnet",
    build=partial(build, file="isnet-general-use.onnx", side_px=1024, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0)),
    uses_gpu=False,
)

ANNOTATORS = (
    Annotator(
        id="remove_background",
        description="The picture with its background transparent",
        apply=remove_background,
        models=(U2NET, ISNET),
        needs=("onnxruntime",),
    ),
)
