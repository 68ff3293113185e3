"""Depth and surface normals: MiDaS, ZoeDepth, Depth Anything V2, NormalBae."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from fanlight.errors import NodeFault
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.device import Device
from services.preprocessor.neural import defects
from services.preprocessor.neural.running import (
    TORCH,
    Network,
    place,
    placed,
    read_weights,
    running,
    to_array,
    to_bytes,
    to_tensor,
    without_prefix,
)
from services.preprocessor.weights import Model

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of ZoeDepth's distances, those that are drawn black and white.
ZOE_NEAR, ZOE_FAR = 2, 85
ZOE_GAMMA = 2.2
# Depth Anything looks at squares of this side.
PATCH_PX = 14
# What ZoeDepth computes for itself, and newer timm does not keep in weights.
COMPUTED = "relative_position_index"
TIMM = (*TORCH, "timm", "torchvision")


def build_midas(folder: Path, device: Device) -> Network:
    path = folder / "dpt_hybrid-midas-501f0c75.pt"
    network = defects.submodule("midas.api").MiDaSInference(model_type="dpt_hybrid", model_path=str(path))
    return placed(device, network.model)


def build_zoe(folder: Path, device: Device) -> Network:
    config = defects.submodule("zoe.zoedepth.utils.config").get_config("zoedepth", "infer")
    network = defects.submodule("zoe.zoedepth.models.zoedepth.zoedepth_v1").ZoeDepth.build_from_config(config)
    state = read_weights(folder / "ZoeD_M12_N.pt")["model"]
    missing, unexpected = network.load_state_dict(state, strict=False)
    if strange := [name for name in (*missing, *unexpected) if COMPUTED not in name]:
        raise NodeFault(f"ZoeD_M12_N.pt does not fit the network: {', '.join(strange[:5])}")
    return Network(device=device, parts=(place(network, device).infer,))


def build_normal_bae(folder: Path, device: Device) -> Network:
    from types import SimpleNamespace

    arguments = SimpleNamespace(
        mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
    )
    network = defects.submodule("normalbae.nets.NNET").NNET(arguments)
    network.load_state_dict(without_prefix(read_weights(folder / "scannet.pt")["model"]))
    return placed(device, network)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthAnything:
    network: Any
    device: Device


def build_depth_anything(folder: Path, device: Device) -> DepthAnything:
    defects.declare_torchvision_operators()
    from transformers import DepthAnythingForDepthEstimation

    network = DepthAnythingForDepthEstimation.from_pretrained(folder, local_files_only=True)
    return DepthAnything(network=place(network, device), device=device)


def from_zero(depth: Any) -> Any:
    """(H, W) with the least as 0 and the most as 1; all 0 where they are the same."""
    spread = depth - depth.min()
    return spread / np.maximum(spread.max(), np.finfo(np.float32).tiny)


def midas_depths(pictures: Sequence[Pixels], network: Network) -> Any:
    """(B, H, W), near is large."""
    return to_array(network(to_tensor(pictures, network.device) / 127.5 - 1.0))


def depth_midas(pictures: Sequence[Pixels], network: Network) -> list[Pixels]:
    return [to_bytes(from_zero(depth)) for depth in midas_depths(pictures, network)]


def normal_midas(pictures: Sequence[Pixels], network: Network, *, a: float, bg_th: float) -> list[Pixels]:
    return [_slopes(depth, a, bg_th) for depth in midas_depths(pictures, network)]


def _slopes(depth: Any, strength: float, background: float) -> Pixels:
    """(H, W, 3): the depth's slopes as normals, flat where it is nearer the background than the threshold."""
    is_far = from_zero(depth) < background
    x, y = (cv2.Sobel(depth, cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (1, 0))
    x[is_far], y[is_far] = 0, 0
    normal = np.stack([x, y, np.full_like(x, strength)], axis=2)
    normal /= np.maximum(np.sum(normal**2.0, axis=2, keepdims=True) ** 0.5, np.finfo(np.float32).tiny)
    return np.ascontiguousarray(np.clip(normal * 127.5 + 127.5, 0, 255).astype(np.uint8)[:, :, ::-1])


def depth_zoe(pictures: Sequence[Pixels], network: Network, *, gamma_corrected: bool) -> list[Pixels]:
    depths = to_array(network(to_tensor(pictures, network.device) / 255.0))[:, 0]
    return [_zoe_map(depth, gamma_corrected) for depth in depths]


def _zoe_map(depth: Any, gamma_corrected: bool) -> Pixels:
    """Distances, near as white. Clipped before the gamma, which has no answer below 0."""
    near, far = np.percentile(depth, ZOE_NEAR), np.percentile(depth, ZOE_FAR)
    spread = np.clip(1.0 - (depth - near) / max(far - near, np.finfo(np.float32).tiny), 0, 1)
    return to_bytes(spread**ZOE_GAMMA if gamma_corrected else spread)


def depth_anything(pictures: Sequence[Pixels], model: DepthAnything) -> list[Pixels]:
    import torch

    height, width = pictures[0].shape[:2]
    size = tuple(max(PATCH_PX, round(side / PATCH_PX) * PATCH_PX) for side in (height, width))
    with running(model.device):
        values = for_imagenet(to_tensor(pictures, model.device))
        values = torch.nn.functional.interpolate(values, size, mode="bicubic")
        depths = model.network(pixel_values=values).predicted_depth[:, None].float()
        whole = torch.nn.functional.interpolate(depths, (height, width), mode="bicubic")
    return [to_bytes(from_zero(depth)) for depth in to_array(whole)[:, 0]]


def for_imagenet(values: Any) -> Any:
    import torch

    mean, std = (torch.tensor(each, device=values.device).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (values / 255.0 - mean) / std


def normal_bae(pictures: Sequence[Pixels], network: Network) -> list[Pixels]:
    """(H, W, 3), a direction as a colour. One by one, for the network draws points at random in a batch."""
    return [_normal_bae(each, network) for each in pictures]


def _normal_bae(picture: Pixels, network: Network) -> Pixels:
    normals = network(for_imagenet(to_tensor([picture], network.device)))[0][-1][:, :3]
    return np.ascontiguousarray(to_bytes((to_array(normals)[0].transpose(1, 2, 0) + 1) * 0.5))


MIDAS = Model(name="midas", entry="annotator-midas", build=build_midas)
ZOE = Model(name="zoe", entry="annotator-zoe", build=build_zoe)
NORMAL_BAE = Model(name="normal_bae", entry="annotator-normalbae", build=build_normal_bae)
DEPTH_ANYTHING = Model(name="depth_anything_v2", entry="annotator-depth-anything-v2", build=build_depth_anything)

ANNOTATORS = (
    Annotator(
        id="depth_midas",
        description="Depth, near is white",
        apply=depth_midas,
        controlnets=("depth",),
        models=(MIDAS,),
        needs=TIMM,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="normal_midas",
        description="Surface normals, from the slopes of the depth",
        apply=normal_midas,
        parameters=(
            Parameter(name="a", default=float(np.pi * 2.0), minimum=0.01, maximum=100, description="Higher is flatter"),
            Parameter(name="bg_th", default=0.1, minimum=0, maximum=1, description="What is farther is flat"),
        ),
        controlnets=("normal",),
        models=(MIDAS,),
        needs=TIMM,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="depth_zoe",
        description="Depth, near is white",
        apply=depth_zoe,
        parameters=(Parameter(name="gamma_corrected", default=False, description="Darker middle distances"),),
        controlnets=("depth",),
        models=(ZOE,),
        needs=TIMM,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="depth_anything_v2",
        description="Depth, near is white, with fine outlines",
        apply=depth_anything,
        controlnets=("depth",),
        models=(DEPTH_ANYTHING,),
        needs=("torch", "transformers"),
        detect_resolution=512,
    ),
    Annotator(
        id="normal_bae",
        description="Surface normals",
        apply=normal_bae,
        controlnets=("normal",),
        models=(NORMAL_BAE,),
        needs=TIMM,
        license="MIT; trained on ScanNet, whose terms allow research only",
        detect_resolution=512,
    ),
)
