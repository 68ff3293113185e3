"""Depth and surface normals by networks of controlnet_aux and transformers.

MiDaS (DPT hybrid): Ranftl et al. 2021. ZoeDepth: Bhat et al. 2023. Depth Anything V2: Yang et al. 2024. NormalBae: Bae
et al. 2021. LeReS: Yin et al. 2021, with the boost that merges several passes over one image: Miangoleh et al. 2021.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from fanlight.errors import NodeFault
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.config import CPU, AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.runtime import (
    TORCH_PACKAGES,
    Network,
    imagenet_normalize,
    inference,
    network_on,
    place,
    pretrained,
    read_weights,
    to_array,
    to_bytes,
    to_tensor,
    widen_outputs,
    without_prefix,
)
from services.preprocessor.weights import AnnotatorWeights

# The percentiles of ZoeDepth's distances that become white and black.
ZOE_NEAR, ZOE_FAR = 2, 85
ZOE_GAMMA = 2.2
# The side of Depth Anything's patches.
PATCH_PX = 14
# ZoeDepth computes these buffers itself, and newer timm does not keep them in the state.
COMPUTED = "relative_position_index"
TIMM_PACKAGES = (*TORCH_PACKAGES, "timm", "torchvision")
# Smaller images have no closer passes to merge; on 160 pixels or less LeReS' boost fails.
BOOST_MIN_PX = 192
FLOAT32_TINY = np.finfo(np.float32).tiny


def build_midas(folder: Path, device: AnnotatorDevice) -> Network:
    path = folder / "dpt_hybrid-midas-501f0c75.pt"
    network = defects.submodule("midas.api").MiDaSInference(model_type="dpt_hybrid", model_path=str(path))
    return network_on(device, network.model)


def build_zoe(folder: Path, device: AnnotatorDevice) -> Network:
    config = defects.submodule("zoe.zoedepth.utils.config").get_config("zoedepth", "infer")
    network = defects.submodule("zoe.zoedepth.models.zoedepth.zoedepth_v1").ZoeDepth.build_from_config(config)
    state = read_weights(folder / "ZoeD_M12_N.pt")["model"]
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unknown := [name for name in (*missing, *unexpected) if COMPUTED not in name]:
        raise NodeFault(f"ZoeD_M12_N.pt does not fit the network: {', '.join(unknown[:5])}")
    return Network(device=device, parts=(place(network, device).infer,))


def build_normal_bae(folder: Path, device: AnnotatorDevice) -> Network:
    from types import SimpleNamespace

    arguments = SimpleNamespace(
        mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
    )
    network = defects.submodule("normalbae.nets.NNET").NNET(arguments)
    network.load_state_dict(without_prefix(read_weights(folder / "scannet.pt")["model"]))
    return network_on(device, network)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthAnything:
    network: Any
    device: AnnotatorDevice


@dataclass(frozen=True, slots=True, kw_only=True)
class Leres:
    """The depth network, and the one that merges passes over an image at different sizes."""

    network: Any
    merger: Any
    device: AnnotatorDevice


def build_depth_anything(folder: Path, device: AnnotatorDevice) -> DepthAnything:
    defects.declare_torchvision_operators()
    from transformers import DepthAnythingForDepthEstimation

    network = pretrained(DepthAnythingForDepthEstimation, folder)
    return DepthAnything(network=place(network, device), device=device)


def normalize_range(depth: Any) -> Any:
    """(H, W) float32 with the least as 0 and the most as 1; all 0 if they are the same."""
    spread = depth - depth.min()
    return spread / np.maximum(spread.max(), FLOAT32_TINY)


def midas_depths(images: Sequence[Pixels], network: Network) -> Any:
    """Inverse depth (B, H, W) float32, near is large, of images (H, W, 3); the network takes RGB in -1 to 1."""
    return to_array(network(to_tensor(images, network.device) / 127.5 - 1.0))


def depth_midas(images: Sequence[Pixels], network: Network) -> list[Pixels]:
    """Depth (H, W) uint8, near is white, of each image (H, W, 3)."""
    return [to_bytes(normalize_range(depth)) for depth in midas_depths(images, network)]


def normal_midas(images: Sequence[Pixels], network: Network, *, a: float, bg_th: float) -> list[Pixels]:
    """Normals (H, W, 3) uint8 of each image (H, W, 3)."""
    return [_slopes(depth, a, bg_th) for depth in midas_depths(images, network)]


def _slopes(depth: Any, strength: float, background: float) -> Pixels:
    """Normals (H, W, 3) uint8 from the slopes of an inverse depth (H, W) float32.

    Flat where the inverse depth, scaled to 0 to 1, is below the threshold `background`.
    """
    is_far = normalize_range(depth) < background
    x, y = (cv2.Sobel(depth, cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (1, 0))
    x[is_far], y[is_far] = 0, 0
    normal = np.stack([x, y, np.full_like(x, strength)], axis=2)
    normal /= np.maximum(np.sum(normal**2.0, axis=2, keepdims=True) ** 0.5, FLOAT32_TINY)
    return np.ascontiguousarray(np.clip(normal * 127.5 + 127.5, 0, 255).astype(np.uint8)[:, :, ::-1])


def depth_zoe(images: Sequence[Pixels], network: Network, *, gamma_corrected: bool) -> list[Pixels]:
    """Depth (H, W) uint8, near is white, of each image (H, W, 3); the network takes RGB in 0 to 1 and gives meters."""
    depths = to_array(network(to_tensor(images, network.device) / 255.0))[:, 0]
    return [_zoe_map(depth, gamma_corrected) for depth in depths]


def _zoe_map(depth: Any, gamma_corrected: bool) -> Pixels:
    """(H, W) uint8, near is white, of distances (H, W) float32. Clipped first: the gamma is undefined below 0."""
    near, far = np.percentile(depth, ZOE_NEAR), np.percentile(depth, ZOE_FAR)
    spread = np.clip(1.0 - (depth - near) / max(far - near, FLOAT32_TINY), 0, 1)
    return to_bytes(spread**ZOE_GAMMA if gamma_corrected else spread)


def depth_anything(images: Sequence[Pixels], model: DepthAnything) -> list[Pixels]:
    """Depth (H, W) uint8, near is white, of each image (H, W, 3)."""
    import torch

    height, width = images[0].shape[:2]
    size = tuple(max(PATCH_PX, round(side / PATCH_PX) * PATCH_PX) for side in (height, width))
    with inference(model.device):
        values = imagenet_normalize(to_tensor(images, model.device))
        values = torch.nn.functional.interpolate(values, size, mode="bicubic")
        depths = model.network(pixel_values=values).predicted_depth[:, None].float()
        whole = torch.nn.functional.interpolate(depths, (height, width), mode="bicubic")
    return [to_bytes(normalize_range(depth)) for depth in to_array(whole)[:, 0]]


def normal_bae(images: Sequence[Pixels], network: Network) -> list[Pixels]:
    """Normals (H, W, 3) uint8 of each image (H, W, 3), a direction as a color.

    One image at a time, because the network samples random points across a batch.
    """
    return [_normal_bae(each, network) for each in images]


def _normal_bae(image: Pixels, network: Network) -> Pixels:
    """(H, W, 3) uint8 of an image (H, W, 3); the network gives directions in -1 to 1."""
    normals = network(imagenet_normalize(to_tensor([image], network.device)))[0][-1][:, :3]
    return np.ascontiguousarray(to_bytes((to_array(normals)[0].transpose(1, 2, 0) + 1) * 0.5))


def build_leres(folder: Path, device: AnnotatorDevice) -> Leres:
    network = defects.submodule("leres.leres.multi_depth_model_woauxi").RelDepthModel(backbone="resnext101")
    network.load_state_dict(without_prefix(read_weights(folder / "res101.pth")["depth_model"]))
    place(network, device)
    # controlnet_aux calls these two inner networks directly.
    widen_outputs(network.depth_model, device)
    merger = _merger(folder, device)
    widen_outputs(merger.netG, device)
    return Leres(network=network, merger=merger, device=device)


def _merger(folder: Path, device: AnnotatorDevice) -> Any:
    """It reads `latest_net_G.pth` from its `save_dir`."""
    with defects.without_arguments():
        options = defects.submodule("leres.pix2pix.options.test_options").TestOptions().parse()
    if device.kind == CPU:
        options.gpu_ids = []
    merger = defects.submodule("leres.pix2pix.models.pix2pix4depth_model").Pix2Pix4DepthModel(options)
    merger.save_dir = str(folder)
    merger.load_networks("latest")
    merger.eval()
    return merger


def depth_leres(images: Sequence[Pixels], model: Leres, *, boost: bool, thr_a: float, thr_b: float) -> list[Pixels]:
    """Depth (H, W) uint8, near is white, of each image (H, W, 3)."""
    return [_leres_map(_leres_depth(each, model, boost), near=thr_a, far=thr_b) for each in images]


def _leres_depth(image: Pixels, model: Leres, boost: bool) -> Any:
    """Distances (H, W), in the network's own range, of an image (H, W, 3) uint8."""
    module = defects.submodule("leres.leres.depthmap")
    height, width = image.shape[:2]
    with inference(model.device):
        if boost and max(width, height) >= BOOST_MIN_PX:
            return module.estimateboost(image, model.network, 0, model.merger, max(width, height))
        return module.estimateleres(image, model.network, width, height)


def _leres_map(depth: Any, *, near: float, far: float) -> Pixels:
    """(H, W) uint8 of distances (H, W), by way of 16 bits as in controlnet_aux.

    `near` and `far`: percent of the range that is cut off.
    """
    low, high = depth.min(), depth.max()
    has_range = high - low > np.finfo("float").eps
    wide = (65535 * (depth - low) / (high - low) if has_range else np.zeros(depth.shape)).astype(np.uint16)
    levels = cv2.convertScaleAbs(wide, alpha=255.0 / 65535.0)
    if near:
        levels = cv2.threshold(levels, near / 100 * 255, 255, cv2.THRESH_TOZERO)[1]
    levels = cv2.bitwise_not(levels)
    if far:
        levels = cv2.threshold(levels, far / 100 * 255, 255, cv2.THRESH_TOZERO)[1]
    return levels


MIDAS = AnnotatorWeights(name="midas", entry="annotator-midas", build=build_midas)
ZOE = AnnotatorWeights(name="zoe", entry="annotator-zoe", build=build_zoe)
NORMAL_BAE = AnnotatorWeights(name="normal_bae", entry="annotator-normalbae", build=build_normal_bae)
DEPTH_ANYTHING = AnnotatorWeights(
    name="depth_anything_v2", entry="annotator-depth-anything-v2", build=build_depth_anything
)
LERES = AnnotatorWeights(name="leres", entry="annotator-leres", build=build_leres)

LERES_PARAMETERS = (
    Parameter(
        name="thr_a", default=0.0, minimum=0, maximum=100, description="How much of the near range is cut off, in %"
    ),
    Parameter(
        name="thr_b", default=0.0, minimum=0, maximum=100, description="How much of the far range is cut off, in %"
    ),
)


def _leres(annotator_id: str, description: str, *, boost: bool) -> Annotator:
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(depth_leres, boost=boost),
        parameters=LERES_PARAMETERS,
        controlnets=("depth",),
        models=(LERES,),
        needs=(*TORCH_PACKAGES, "torchvision", "skimage"),
        license="non-commercial: see the license of AdelaiDepth",
        detect_resolution=512,
    )


ANNOTATORS = (
    Annotator(
        id="depth_midas",
        description="Depth, near is white",
        apply=depth_midas,
        controlnets=("depth",),
        models=(MIDAS,),
        needs=TIMM_PACKAGES,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="normal_midas",
        description="Surface normals, from the slopes of the depth",
        apply=normal_midas,
        parameters=(
            Parameter(
                name="a",
                default=float(np.pi * 2.0),
                minimum=0.01,
                maximum=100,
                description="Higher gives flatter surfaces",
            ),
            Parameter(
                name="bg_th",
                default=0.1,
                minimum=0,
                maximum=1,
                description="What is farther away than this becomes flat",
            ),
        ),
        controlnets=("normal",),
        models=(MIDAS,),
        needs=TIMM_PACKAGES,
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
        needs=TIMM_PACKAGES,
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
        needs=TIMM_PACKAGES,
        license="MIT; trained on ScanNet, whose terms allow research only",
        detect_resolution=512,
    ),
    _leres("depth_leres", "Depth, near is white", boost=False),
    _leres("depth_leres++", "Depth merged from several passes over the image, slow and fine", boost=True),
)
