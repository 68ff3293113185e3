"""Edges and lines by the smaller networks of controlnet_aux: PiDiNet, line art, TEED, Anyline, M-LSD.

PiDiNet: Su et al. 2021. Line art: Chan et al. 2022 (informative drawings), and the anime network of ControlNet 1.1.
TEED: Soria et al. 2023; Anyline: TheMistoAI's training of it. M-LSD: Gu et al. 2022.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.annotators.lines import lineart_parameters, lineart_standard
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.hed import SAFE_STEPS, fuse, quantize, to_scribble
from services.preprocessor.neural.runtime import (
    TORCH_PACKAGES,
    Network,
    inference,
    network_on,
    read_weights,
    to_array,
    to_bytes,
    to_tensor,
    without_prefix,
)
from services.preprocessor.weights import AnnotatorWeights

# The anime network halves each side eight times.
ANIME_STEP_PX = 256
# Anyline drops groups of fewer pixels. Its own limit is 36, because it counts each pixel once per channel.
SPECK_PX = 12


def build_pidinet(folder: Path, device: AnnotatorDevice) -> Network:
    network = defects.submodule("pidi.model").pidinet()
    network.load_state_dict(without_prefix(read_weights(folder / "table5_pidinet.pth")["state_dict"]))
    return network_on(device, network)


def build_lineart(folder: Path, device: AnnotatorDevice) -> Network:
    """Two parts: the fine network, then the coarse one."""
    parts = []
    for name in ("sk_model.pth", "sk_model2.pth"):
        part = defects.submodule("lineart").Generator(3, 1, 3)
        part.load_state_dict(read_weights(folder / name))
        parts.append(part)
    return network_on(device, *parts)


def build_lineart_anime(folder: Path, device: AnnotatorDevice) -> Network:
    from torch.nn import InstanceNorm2d

    norm = partial(InstanceNorm2d, affine=False, track_running_stats=False)
    network = defects.submodule("lineart_anime").UnetGenerator(3, 1, 8, 64, norm_layer=norm, use_dropout=False)
    network.load_state_dict(without_prefix(read_weights(folder / "netG.pth")))
    return network_on(device, network)


def build_teed(folder: Path, device: AnnotatorDevice, *, file: str) -> Network:
    network = defects.submodule("teed.ted").TED()
    network.load_state_dict(read_weights(folder / file))
    return network_on(device, network)


def build_mlsd(folder: Path, device: AnnotatorDevice) -> Network:
    network = defects.submodule("mlsd.models.mbv2_mlsd_large").MobileV2_MLSD_Large()
    network.load_state_dict(read_weights(folder / "mlsd_large_512_fp32.pth"), strict=True)
    return network_on(device, network)


def build_mlsd_tiny(folder: Path, device: AnnotatorDevice) -> Network:
    network = defects.submodule("mlsd.models.mbv2_mlsd_tiny").MobileV2_MLSD_Tiny()
    network.load_state_dict(read_weights(folder / "mlsd_tiny_512_fp32.pth"), strict=True)
    return network_on(device, network)


def pidinet(
    images: Sequence[Pixels], network: Network, *, scribble: bool, safe: bool, apply_filter: bool
) -> list[Pixels]:
    """Edges (H, W) uint8 of each image (H, W, 3); the network takes BGR in 0 to 1."""
    values = to_array(network(to_tensor(images, network.device).flip(1) / 255.0)[-1])[:, 0]
    if apply_filter:
        values = (values > 0.5).astype(np.float32)
    maps = [to_bytes(quantize(each, SAFE_STEPS) if safe else each) for each in values]
    return [to_scribble(each) for each in maps] if scribble else maps


def lineart(images: Sequence[Pixels], network: Network, *, coarse: bool) -> list[Pixels]:
    """Lines (H, W) uint8, white on black, of each image (H, W, 3); the network gives dark lines in 0 to 1."""
    values = to_array(network(to_tensor(images, network.device) / 255.0, part=int(coarse)))[:, 0]
    return [255 - to_bytes(each) for each in values]


def lineart_anime(images: Sequence[Pixels], network: Network) -> list[Pixels]:
    """Lines (H, W) uint8, white on black, of each image (H, W, 3); the network takes and gives -1 to 1, dark lines."""
    height, width = images[0].shape[:2]
    size = tuple(ANIME_STEP_PX * -(-side // ANIME_STEP_PX) for side in (width, height))
    larger = [cv2.resize(each, size, interpolation=cv2.INTER_CUBIC) for each in images]
    values = to_array(network(to_tensor(larger, network.device) / 127.5 - 1.0))[:, 0] * 127.5 + 127.5
    lines = [cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in values]
    return [255 - np.clip(each, 0, 255).astype(np.uint8) for each in lines]


def teed(images: Sequence[Pixels], network: Network, *, safe_steps: int) -> list[Pixels]:
    """Edges (H, W) uint8 of each image (H, W, 3); the network gives logits at several sizes, fused as HED's are."""
    height, width = images[0].shape[:2]
    sides = [to_array(each)[:, 0] for each in network(to_tensor(images, network.device))]
    maps = [fuse([side[number] for side in sides], width, height) for number in range(len(images))]
    return [to_bytes(quantize(edge, safe_steps) if safe_steps else edge) for edge in maps]


def anyline(
    images: Sequence[Pixels], network: Network, *, gaussian_sigma: float, intensity_threshold: int
) -> list[Pixels]:
    """(H, W) uint8 of each image (H, W, 3): TEED's edges with lineart_standard's lines over them, as Anyline does."""
    maps = teed(images, network, safe_steps=SAFE_STEPS)
    lines = [
        lineart_standard(each, gaussian_sigma=gaussian_sigma, intensity_threshold=intensity_threshold)
        for each in images
    ]
    return [_over(edge, _without_specks(line)) for edge, line in zip(maps, lines, strict=True)]


def _without_specks(lines: Pixels) -> Pixels:
    """Lines (H, W) uint8 without connected groups of a few pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((lines > 0).astype(np.uint8), connectivity=4)
    return np.where(stats[labels, cv2.CC_STAT_AREA] < SPECK_PX, np.uint8(0), lines)


def _over(edges: Pixels, lines: Pixels) -> Pixels:
    """(H, W) uint8: edges, screen-blended with the lines where there are lines. The bytes overflow, as Anyline's do."""
    one = np.uint8(1)
    with np.errstate(over="ignore"):
        screened = one - (one - lines) * (one - edges)
    return np.where(lines > 0, screened, edges)


def mlsd(images: Sequence[Pixels], network: Network, *, thr_v: float, thr_d: float) -> list[Pixels]:
    """Straight lines (H, W) uint8, 0 or 255, one pixel wide, of each image (H, W, 3)."""
    return [_mlsd(each, network, thr_v, thr_d) for each in images]


def _mlsd(image: Pixels, network: Network, score: float, distance: float) -> Pixels:
    """Straight lines (H, W) uint8 of one image (H, W, 3)."""
    canvas = np.zeros(image.shape[:2], np.uint8)
    with inference(network.device):
        for x1, y1, x2, y2 in defects.mlsd_lines(image, network.parts[0], score, distance):
            cv2.line(canvas, (x1, y1), (x2, y2), 255, 1)
    return canvas


PIDINET = AnnotatorWeights(name="pidinet", entry="annotator-pidinet", build=build_pidinet)
LINEART = AnnotatorWeights(name="lineart", entry="annotator-lineart", build=build_lineart)
LINEART_ANIME = AnnotatorWeights(name="lineart_anime", entry="annotator-lineart-anime", build=build_lineart_anime)
TEED = AnnotatorWeights(name="teed", entry="annotator-teed", build=partial(build_teed, file="7_model.pth"))
MTEED = AnnotatorWeights(name="anyline", entry="annotator-anyline", build=partial(build_teed, file="MTEED.pth"))
MLSD = AnnotatorWeights(name="mlsd", entry="annotator-mlsd", build=build_mlsd)
MLSD_TINY = AnnotatorWeights(name="mlsd_tiny", entry="annotator-mlsd-tiny", build=build_mlsd_tiny)

PIDINET_LICENSE = "research only: see the license of PiDiNet"
FILTER = Parameter(
    name="apply_filter", default=False, description="Black and white only, with the threshold at one half"
)


def _pidinet(annotator_id: str, description: str, *, scribble: bool, safe: bool) -> Annotator:
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(pidinet, scribble=scribble, safe=safe),
        parameters=(FILTER,),
        controlnets=("scribble" if scribble else "softedge",),
        models=(PIDINET,),
        needs=TORCH_PACKAGES,
        license=PIDINET_LICENSE,
        detect_resolution=512,
        is_bilevel=scribble,
    )


def _lineart(annotator_id: str, description: str, *, coarse: bool) -> Annotator:
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(lineart, coarse=coarse),
        controlnets=("lineart",),
        models=(LINEART,),
        needs=TORCH_PACKAGES,
        license="MIT",
        detect_resolution=512,
    )


ANNOTATORS = (
    _pidinet("softedge_pidinet", "Soft edges by a small network", scribble=False, safe=False),
    _pidinet("softedge_pidsafe", "Soft edges by a small network, on few levels", scribble=False, safe=True),
    _pidinet("scribble_pidinet", "Scribbles along the edges", scribble=True, safe=False),
    _pidinet("scribble_pidsafe", "Scribbles along edges of few levels", scribble=True, safe=True),
    _lineart("lineart_realistic", "Lines as a person would draw them", coarse=False),
    _lineart("lineart_coarse", "Fewer, rougher lines", coarse=True),
    Annotator(
        id="lineart_anime",
        description="Lines of anime and other drawings",
        apply=lineart_anime,
        controlnets=("lineart_anime",),
        models=(LINEART_ANIME,),
        needs=TORCH_PACKAGES,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="teed",
        description="Fine soft edges by a tiny network",
        apply=teed,
        parameters=(
            Parameter(
                name="safe_steps",
                default=2,
                minimum=0,
                maximum=10,
                description="How many levels the map has; 0 keeps them all",
            ),
        ),
        controlnets=("softedge",),
        models=(TEED,),
        needs=TORCH_PACKAGES,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="anyline",
        description="Soft edges together with the lines of lineart_standard",
        apply=anyline,
        parameters=lineart_parameters(gaussian_sigma=2.0, intensity_threshold=3),
        controlnets=("softedge", "lineart"),
        models=(MTEED,),
        needs=TORCH_PACKAGES,
        license="OpenRAIL++-M",
        detect_resolution=1280,
    ),
    Annotator(
        id="mlsd",
        description="Straight lines, such as of houses and rooms",
        apply=mlsd,
        parameters=(
            Parameter(name="thr_v", default=0.1, minimum=0, maximum=2, description="Less confident lines are dropped"),
            Parameter(name="thr_d", default=0.1, minimum=0, maximum=20, description="Shorter lines are dropped"),
        ),
        controlnets=("mlsd",),
        models=(MLSD, MLSD_TINY),
        needs=TORCH_PACKAGES,
        detect_resolution=512,
        is_bilevel=True,
    ),
)
