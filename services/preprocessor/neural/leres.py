"""Depth by LeReS (Yin et al. 2021), alone or with the boost that merges several looks (Miangoleh et al. 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.device import CPU, Device
from services.preprocessor.neural import defects
from services.preprocessor.neural.running import (
    TORCH,
    answering_in_float32,
    place,
    read_weights,
    running,
    without_prefix,
)
from services.preprocessor.weights import Model

# Smaller pictures have no closer looks to merge; on one of 160 pixels or less the boost breaks.
BOOST_MIN_PX = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Leres:
    network: Any
    merger: Any
    device: Device


def build(folder: Path, device: Device) -> Leres:
    network = defects.submodule("leres.leres.multi_depth_model_woauxi").RelDepthModel(backbone="resnext101")
    network.load_state_dict(without_prefix(read_weights(folder / "res101.pth")["depth_model"]))
    place(network, device)
    # Upstream calls these two by themselves.
    answering_in_float32(network.depth_model, device)
    merger = _merger(folder, device)
    answering_in_float32(merger.netG, device)
    return Leres(network=network, merger=merger, device=device)


def _merger(folder: Path, device: Device) -> Any:
    """The network that merges looks at different sizes; it reads `latest_net_G.pth` from its `save_dir`."""
    with defects.without_arguments():
        options = defects.submodule("leres.pix2pix.options.test_options").TestOptions().parse()
    if device.kind == CPU:
        options.gpu_ids = []
    merger = defects.submodule("leres.pix2pix.models.pix2pix4depth_model").Pix2Pix4DepthModel(options)
    merger.save_dir = str(folder)
    merger.load_networks("latest")
    merger.eval()
    return merger


def depth_leres(pictures: Sequence[Pixels], model: Leres, *, boost: bool, thr_a: float, thr_b: float) -> list[Pixels]:
    return [_map(_depth(each, model, boost), near=thr_a, far=thr_b) for each in pictures]


def _depth(picture: Pixels, model: Leres, boost: bool) -> Any:
    module = defects.submodule("leres.leres.depthmap")
    height, width = picture.shape[:2]
    with running(model.device):
        if boost and max(width, height) >= BOOST_MIN_PX:
            return module.estimateboost(picture, model.network, 0, model.merger, max(width, height))
        return module.estimateleres(picture, model.network, width, height)


def _map(depth: Any, *, near: float, far: float) -> Pixels:
    """Through 16 bits to 8, as upstream; `near` and `far` are how much of the range is cut, in percent."""
    low, high = depth.min(), depth.max()
    spread = high - low > np.finfo("float").eps
    wide = (65535 * (depth - low) / (high - low) if spread else np.zeros(depth.shape)).astype(np.uint16)
    levels = cv2.convertScaleAbs(wide, alpha=255.0 / 65535.0)
    if near:
        levels = cv2.threshold(levels, near / 100 * 255, 255, cv2.THRESH_TOZERO)[1]
    levels = cv2.bitwise_not(levels)
    if far:
        levels = cv2.threshold(levels, far / 100 * 255, 255, cv2.THRESH_TOZERO)[1]
    return levels


LERES = Model(name="leres", entry="annotator-leres", build=build)
NEAR = Parameter(name="thr_a", default=0.0, minimum=0, maximum=100, description="How much of the near is cut, in %")
FAR = Parameter(name="thr_b", default=0.0, minimum=0, maximum=100, description="How much of the far is cut, in %")


def _annotator(annotator_id: str, description: str, *, boost: bool) -> Annotator:
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(depth_leres, boost=boost),
        parameters=(NEAR, FAR),
        controlnets=("depth",),
        models=(LERES,),
        needs=(*TORCH, "torchvision", "skimage"),
        license="non-commercial: see the license of AdelaiDepth",
        detect_resolution=512,
    )


ANNOTATORS = (
    _annotator("depth_leres", "Depth, near is white", boost=False),
    _annotator("depth_leres++", "Depth from several looks at the picture, slow and fine", boost=True),
)
