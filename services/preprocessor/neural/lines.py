"""Edges and lines by smaller networks of controlnet_aux: PiDiNet, line art, TEED, Anyline, M-LSD."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.annotators.lineart import line_parameters, lineart_standard
from services.preprocessor.device import Device
from services.preprocessor.neural import defects
from services.preprocessor.neural.hed import SAFE_STEPS, merged
from services.preprocessor.neural.running import (
    TORCH,
    Network,
    placed,
    read_weights,
    running,
    to_array,
    to_bytes,
    to_tensor,
    without_prefix,
)
from services.preprocessor.neural.strokes import scribbled, stepped
from services.preprocessor.weights import Model

# The anime network halves its sides eight times.
ANIME_STEP_PX = 256
# Specks of fewer pixels are no line to Anyline, which counts each three times: once a channel of 36.
SPECK_PX = 12


def build_pidinet(folder: Path, device: Device) -> Network:
    network = defects.submodule("pidi.model").pidinet()
    network.load_state_dict(without_prefix(read_weights(folder / "table5_pidinet.pth")["state_dict"]))
    return placed(device, network)


def build_lineart(folder: Path, device: Device) -> Network:
    """The fine network, then the coarse one."""
    parts = []
    for name in ("sk_model.pth", "sk_model2.pth"):
        part = defects.submodule("lineart").Generator(3, 1, 3)
        part.load_state_dict(read_weights(folder / name))
        parts.append(part)
    return placed(device, *parts)


def build_lineart_anime(folder: Path, device: Device) -> Network:
    from torch.nn import InstanceNorm2d

    norm = partial(InstanceNorm2d, affine=False, track_running_stats=False)
    network = defects.submodule("lineart_anime").UnetGenerator(3, 1, 8, 64, norm_layer=norm, use_dropout=False)
    network.load_state_dict(without_prefix(read_weights(folder / "netG.pth")))
    return placed(device, network)


def build_teed(folder: Path, device: Device, *, file: str) -> Network:
    network = defects.submodule("teed.ted").TED()
    network.load_state_dict(read_weights(folder / file))
    return placed(device, network)


def build_mlsd(folder: Path, device: Device) -> Network:
    network = defects.submodule("mlsd.models.mbv2_mlsd_large").MobileV2_MLSD_Large()
    network.load_state_dict(read_weights(folder / "mlsd_large_512_fp32.pth"), strict=True)
    return placed(device, network)


def pidinet(
    pictures: Sequence[Pixels], network: Network, *, scribble: bool, safe: bool, apply_filter: bool
) -> list[Pixels]:
    """Edges (H, W); the network reads BGR in 0 to 1."""
    values = to_array(network(to_tensor(pictures, network.device).flip(1) / 255.0)[-1])[:, 0]
    if apply_filter:
        values = (values > 0.5).astype(np.float32)
    maps = [to_bytes(stepped(each, SAFE_STEPS) if safe else each) for each in values]
    return [scribbled(each) for each in maps] if scribble else maps


def lineart(pictures: Sequence[Pixels], network: Network, *, coarse: bool) -> list[Pixels]:
    """Lines (H, W), white on black."""
    values = to_array(network(to_tensor(pictures, network.device) / 255.0, part=int(coarse)))[:, 0]
    return [255 - to_bytes(each) for each in values]


def lineart_anime(pictures: Sequence[Pixels], network: Network) -> list[Pixels]:
    height, width = pictures[0].shape[:2]
    size = tuple(ANIME_STEP_PX * -(-side // ANIME_STEP_PX) for side in (width, height))
    larger = [cv2.resize(each, size, interpolation=cv2.INTER_CUBIC) for each in pictures]
    values = to_array(network(to_tensor(larger, network.device) / 127.5 - 1.0))[:, 0] * 127.5 + 127.5
    lines = [cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in values]
    return [255 - np.clip(each, 0, 255).astype(np.uint8) for each in lines]


def teed(pictures: Sequence[Pixels], network: Network, *, safe_steps: int) -> list[Pixels]:
    height, width = pictures[0].shape[:2]
    sides = [to_array(each)[:, 0] for each in network(to_tensor(pictures, network.device))]
    maps = [merged([side[number] for side in sides], width, height) for number in range(len(pictures))]
    return [to_bytes(stepped(edge, safe_steps) if safe_steps else edge) for edge in maps]


def anyline(
    pictures: Sequence[Pixels], network: Network, *, gaussian_sigma: float, intensity_threshold: int
) -> list[Pixels]:
    """TEED's edges with the lines of drawings over them, as in TheMistoAI's Anyline."""
    maps = teed(pictures, network, safe_steps=SAFE_STEPS)
    lines = [
        lineart_standard(each, gaussian_sigma=gaussian_sigma, intensity_threshold=intensity_threshold)
        for each in pictures
    ]
    return [_over(edge, _without_specks(line)) for edge, line in zip(maps, lines, strict=True)]


def _without_specks(lines: Pixels) -> Pixels:
    _, labels, stats, _ = cv2.connectedComponentsWithStats((lines > 0).astype(np.uint8), connectivity=4)
    return np.where(stats[labels, cv2.CC_STAT_AREA] < SPECK_PX, np.uint8(0), lines)


def _over(edges: Pixels, lines: Pixels) -> Pixels:
    """One screened by the other where there are lines, in bytes that wrap around as Anyline's do."""
    one = np.uint8(1)
    with np.errstate(over="ignore"):
        screened = one - (one - lines) * (one - edges)
    return np.where(lines > 0, screened, edges)


def mlsd(pictures: Sequence[Pixels], network: Network, *, thr_v: float, thr_d: float) -> list[Pixels]:
    """Straight lines (H, W), one pixel wide."""
    return [_mlsd(each, network, thr_v, thr_d) for each in pictures]


def _mlsd(picture: Pixels, network: Network, score: float, distance: float) -> Pixels:
    canvas = np.zeros(picture.shape[:2], np.uint8)
    with running(network.device):
        for x1, y1, x2, y2 in defects.mlsd_lines(picture, network.parts[0], score, distance):
            cv2.line(canvas, (x1, y1), (x2, y2), 255, 1)
    return canvas


PIDINET = Model(name="pidinet", entry="annotator-pidinet", build=build_pidinet)
LINEART = Model(name="lineart", entry="annotator-lineart", build=build_lineart)
LINEART_ANIME = Model(name="lineart_anime", entry="annotator-lineart-anime", build=build_lineart_anime)
TEED = Model(name="teed", entry="annotator-teed", build=partial(build_teed, file="7_model.pth"))
MTEED = Model(name="anyline", entry="annotator-anyline", build=partial(build_teed, file="MTEED.pth"))
MLSD = Model(name="mlsd", entry="annotator-mlsd", build=build_mlsd)

PIDINET_LICENCE = "research only: see the license of PiDiNet"
FILTER = Parameter(name="apply_filter", default=False, description="Black and white, cut at one half")


def _pidinet(annotator_id: str, description: str, *, scribble: bool, safe: bool) -> Annotator:
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(pidinet, scribble=scribble, safe=safe),
        parameters=(FILTER,),
        controlnets=("scribble" if scribble else "softedge",),
        models=(PIDINET,),
        needs=TORCH,
        license=PIDINET_LICENCE,
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
        needs=TORCH,
        license="MIT",
        detect_resolution=512,
    )


ANNOTATORS = (
    _pidinet("softedge_pidinet", "Soft edges by a small network", scribble=False, safe=False),
    _pidinet("softedge_pidsafe", "Soft edges by a small network, on few levels", scribble=False, safe=True),
    _pidinet("scribble_pidinet", "Scribbles along the edges", scribble=True, safe=False),
    _pidinet("scribble_pidsafe", "Scribbles along edges of few levels", scribble=True, safe=True),
    _lineart("lineart_realistic", "Lines as somebody would draw them", coarse=False),
    _lineart("lineart_coarse", "Fewer, rougher lines", coarse=True),
    Annotator(
        id="lineart_anime",
        description="Lines of drawn pictures",
        apply=lineart_anime,
        controlnets=("lineart_anime",),
        models=(LINEART_ANIME,),
        needs=TORCH,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="teed",
        description="Fine soft edges by a tiny network",
        apply=teed,
        parameters=(
            Parameter(
                name="safe_steps", default=2, minimum=0, maximum=10, description="How many levels; 0 keeps them all"
            ),
        ),
        controlnets=("softedge",),
        models=(TEED,),
        needs=TORCH,
        license="MIT",
        detect_resolution=512,
    ),
    Annotator(
        id="anyline",
        description="Soft edges and the lines of drawings together",
        apply=anyline,
        parameters=line_parameters(gaussian_sigma=2.0, intensity_threshold=3),
        controlnets=("softedge", "lineart"),
        models=(MTEED,),
        needs=TORCH,
        license="OpenRAIL++-M",
        detect_resolution=1280,
    ),
    Annotator(
        id="mlsd",
        description="Straight lines, such as of houses and rooms",
        apply=mlsd,
        parameters=(
            Parameter(name="thr_v", default=0.1, minimum=0, maximum=2, description="Lines less sure are dropped"),
            Parameter(name="thr_d", default=0.1, minimum=0, maximum=20, description="Lines shorter are dropped"),
        ),
        controlnets=("mlsd",),
        models=(MLSD,),
        needs=TORCH,
        detect_resolution=512,
        is_bilevel=True,
    ),
)
