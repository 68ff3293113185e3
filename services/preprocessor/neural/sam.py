"""Everything in the picture by Segment Anything (Kirillov et al. 2023), each thing in a colour of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.device import Device
from services.preprocessor.neural import defects
from services.preprocessor.neural.running import TORCH, place, running
from services.preprocessor.weights import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sam:
    network: Any
    device: Device


def build(folder: Path, device: Device, *, kind: str, file: str) -> Sam:
    build_one = defects.submodule("segment_anything.build_sam").sam_model_registry[kind]
    return Sam(network=place(build_one(checkpoint=str(folder / file)), device), device=device)


def sam(pictures: Sequence[Pixels], model: Sam, *, seed: int, **settings: Any) -> list[Pixels]:
    return [_sam(each, model, seed, settings) for each in pictures]


def _sam(picture: Pixels, model: Sam, seed: int, settings: dict[str, Any]) -> Pixels:
    """(H, W, 3): larger things below smaller ones; black where nothing was found.

    Colours as controlnet_aux's detector draws them after `numpy.random.seed(seed)`.
    """
    with running(model.device):
        found = defects.sam_generator()(model.network, **_with_grids(**settings)).generate(picture)
    colours = np.random.RandomState(seed)
    canvas = np.zeros_like(picture)
    for thing in sorted(found, key=lambda each: -int(each["area"])):
        canvas[thing["segmentation"]] = [colours.randint(255, dtype=np.uint8) for _ in range(3)]
    return canvas


def _with_grids(
    *, points_per_side: int, crop_n_layers: int, crop_n_points_downscale_factor: int, **others: Any
) -> dict[str, Any]:
    """The settings with the points that are looked at; at least one in every layer of parts, unlike upstream's."""
    grid = defects.submodule("segment_anything.utils.amg").build_point_grid
    sides = (points_per_side // crop_n_points_downscale_factor**layer for layer in range(crop_n_layers + 1))
    grids = [grid(max(1, side)) for side in sides]
    return others | {"points_per_side": None, "point_grids": grids, "crop_n_layers": crop_n_layers}


MODELS = (
    Model(name="vit_h", entry="annotator-sam", build=partial(build, kind="vit_h", file="sam_vit_h_4b8939.pth")),
    Model(name="vit_l", entry="annotator-sam-l", build=partial(build, kind="vit_l", file="sam_vit_l_0b3195.pth")),
    Model(name="vit_b", entry="annotator-sam-b", build=partial(build, kind="vit_b", file="sam_vit_b_01ec64.pth")),
    Model(name="vit_t", entry="annotator-mobile-sam", build=partial(build, kind="vit_t", file="mobile_sam.pt")),
)


def _number(name: str, default: float, maximum: float, description: str) -> Parameter:
    return Parameter(name=name, default=default, minimum=0, maximum=maximum, description=description)


PARAMETERS = (
    Parameter(
        name="points_per_side", default=32, minimum=1, maximum=128, description="It looks at this many points squared"
    ),
    Parameter(
        name="points_per_batch",
        default=64,
        minimum=1,
        maximum=256,
        description="Points at a time: more take more memory",
    ),
    _number("pred_iou_thresh", 0.88, 1, "Masks that the network thinks worse of are dropped"),
    _number("stability_score_thresh", 0.95, 1, "Masks that change more with their threshold are dropped"),
    _number("stability_score_offset", 1.0, 10, "How far the threshold is moved for that"),
    _number("box_nms_thresh", 0.7, 1, "Masks that overlap a better one more are dropped"),
    Parameter(
        name="crop_n_layers", default=0, minimum=0, maximum=3, description="How often it also looks at parts, closer"
    ),
    _number("crop_nms_thresh", 0.7, 1, "As box_nms_thresh, between parts"),
    _number("crop_overlap_ratio", 512 / 1500, 1, "How much parts overlap"),
    Parameter(
        name="crop_n_points_downscale_factor", default=1, minimum=1, maximum=8, description="Fewer points in parts"
    ),
    Parameter(
        name="min_mask_region_area", default=0, minimum=0, maximum=10**6, description="Smaller holes and specks go"
    ),
    Parameter(name="seed", default=0, minimum=0, maximum=2**32 - 1, description="The same seed, the same colours"),
)

ANNOTATORS = (
    Annotator(
        id="sam",
        description="Everything in the picture, each thing in a colour",
        apply=sam,
        parameters=PARAMETERS,
        models=MODELS,
        needs=(*TORCH, "torchvision", "timm"),
        detect_resolution=512,
        has_labels=True,
    ),
)
