"""Every object in its own color, by Segment Anything (Kirillov et al. 2023) or MobileSAM (Zhang et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.runtime import TORCH_PACKAGES, inference, place
from services.preprocessor.weights import AnnotatorWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Sam:
    network: Any
    device: AnnotatorDevice


def build(folder: Path, device: AnnotatorDevice, *, kind: str, file: str) -> Sam:
    build_one = defects.submodule("segment_anything.build_sam").sam_model_registry[kind]
    return Sam(network=place(build_one(checkpoint=str(folder / file)), device), device=device)


def sam(images: Sequence[Pixels], model: Sam, *, seed: int, **settings: Any) -> list[Pixels]:
    """(H, W, 3) uint8 of each image (H, W, 3)."""
    return [_sam(each, model, seed, settings) for each in images]


def _sam(image: Pixels, model: Sam, seed: int, settings: dict[str, Any]) -> Pixels:
    """(H, W, 3) uint8: smaller objects over larger ones; black where nothing was found.

    The colors are those of controlnet_aux's SamDetector after `numpy.random.seed(seed)`.
    """
    with inference(model.device):
        found = defects.sam_generator()(model.network, **_with_grids(**settings)).generate(image)
    colors = np.random.RandomState(seed)
    canvas = np.zeros_like(image)
    for mask in sorted(found, key=lambda each: -int(each["area"])):
        canvas[mask["segmentation"]] = [colors.randint(255, dtype=np.uint8) for _ in range(3)]
    return canvas


def _with_grids(
    *, points_per_side: int, crop_n_layers: int, crop_n_points_downscale_factor: int, **others: Any
) -> dict[str, Any]:
    """The settings with the points that prompt the network: at least one in every crop layer, unlike upstream."""
    grid = defects.submodule("segment_anything.utils.amg").build_point_grid
    sides = (points_per_side // crop_n_points_downscale_factor**layer for layer in range(crop_n_layers + 1))
    grids = [grid(max(1, side)) for side in sides]
    return others | {"points_per_side": None, "point_grids": grids, "crop_n_layers": crop_n_layers}


MODELS = (
    AnnotatorWeights(
        name="vit_h", entry="annotator-sam", build=partial(build, kind="vit_h", file="sam_vit_h_4b8939.pth")
    ),
    AnnotatorWeights(
        name="vit_l", entry="annotator-sam-l", build=partial(build, kind="vit_l", file="sam_vit_l_0b3195.pth")
    ),
    AnnotatorWeights(
        name="vit_b", entry="annotator-sam-b", build=partial(build, kind="vit_b", file="sam_vit_b_01ec64.pth")
    ),
    AnnotatorWeights(
        name="vit_t", entry="annotator-mobile-sam", build=partial(build, kind="vit_t", file="mobile_sam.pt")
    ),
)


def _number(name: str, default: float, maximum: float, description: str) -> Parameter:
    return Parameter(name=name, default=default, minimum=0, maximum=maximum, description=description)


PARAMETERS = (
    Parameter(
        name="points_per_side",
        default=32,
        minimum=1,
        maximum=128,
        description="The network is prompted with a grid of this many points per side",
    ),
    Parameter(
        name="points_per_batch",
        default=64,
        minimum=1,
        maximum=256,
        description="Points per batch; more need more memory",
    ),
    _number("pred_iou_thresh", 0.88, 1, "Masks whose quality, as the network predicts it, is lower are dropped"),
    _number("stability_score_thresh", 0.95, 1, "Masks that are less stable when their threshold is moved are dropped"),
    _number("stability_score_offset", 1.0, 10, "How far the threshold is moved to measure stability"),
    _number("box_nms_thresh", 0.7, 1, "Masks whose boxes overlap a better one by more are dropped"),
    Parameter(
        name="crop_n_layers",
        default=0,
        minimum=0,
        maximum=3,
        description="How many layers of crops are searched too, at a closer range",
    ),
    _number("crop_nms_thresh", 0.7, 1, "As box_nms_thresh, between crops"),
    _number("crop_overlap_ratio", 512 / 1500, 1, "How much crops overlap"),
    Parameter(
        name="crop_n_points_downscale_factor",
        default=1,
        minimum=1,
        maximum=8,
        description="Crops get fewer points by this factor per layer",
    ),
    Parameter(
        name="min_mask_region_area",
        default=0,
        minimum=0,
        maximum=10**6,
        description="Smaller holes and specks are removed, in pixels",
    ),
    Parameter(name="seed", default=0, minimum=0, maximum=2**32 - 1, description="The same seed gives the same colors"),
)

ANNOTATORS = (
    Annotator(
        id="sam",
        description="Every object in the image, each in its own color",
        apply=sam,
        parameters=PARAMETERS,
        models=MODELS,
        needs=(*TORCH_PACKAGES, "torchvision", "timm"),
        detect_resolution=512,
        has_labels=True,
    ),
)
