"""Semantic segmentation in the colors of the segmentation ControlNet, and foreground segmentation.

OneFormer (Jain et al. 2023) and UperNet with ConvNeXt (Xiao et al. 2018) come from transformers. The networks that
remove the background are rembg's (https://github.com/danielgatis/rembg): U2-Net (Qin et al. 2020) and IS-Net (Qin et
al. 2022); the one for people is MediaPipe's selfie segmentation.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.annotators.faces import forward, read_network
from services.preprocessor.config import AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.runtime import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    imagenet_normalize,
    inference,
    open_session,
    place,
    pretrained,
    to_bytes,
    to_tensor,
)
from services.preprocessor.weights import AnnotatorWeights, answers_of

Triple = tuple[float, float, float]

# The task that OneFormer gets as text, in the words of its training.
TASK = "the task is semantic"
# What `remove_background` gives.
IMAGE, MASK, BACKGROUND_MASK = "image", "mask", "background_mask"
# The colors of COCO's panoptic categories in the order of their numbers: 80 things, then 53 kinds of stuff.
COCO_HEX = """
dc143c 770b20 00008e 0000e6 6a00e4 003c64 005064 000046 0000c0 faaa1e 64aa1e dcdc00 af74af fa001e a52a2a ff4dff
00e2fc b6b6ff 005200 78a69d 6e4c00 ae39ff c76400 480076 ffb3f0 007d5c d10097 bcd0b6 00dcb0 ff63a4 5c0049 8581ff
4eb4ff 00e400 aefff3 2d59ff 868667 9194ae ffd0ba c5e2ff ab8601 6d3f36 cf8aff 97005f 09503d 546933 4a4169 a6c466
d0c3d2 ff6d41 008f95 b300c2 d1636a 057900 e3ffcd 93bad0 994501 035fa1 a3ff00 7700aa 00b6c7 00a578 b78258 5f2000
827287 6e8185 a64a76 db8eb9 4fd272 b25a3e 41460f 7fa773 3b696a 8e6c2d c4ac00 5f3650 804cff c93901 f6007a bfa2d0
ffff80 93d3cb 966464 a8abac 9270c6 d2aa64 5c8859 da58b8 f18100 d911ff 7c4ab5 464646 ffe4ff 9ad000 c1005c 4c5b71
ffb4c3 6a9ab0 e6968c 3c8fff 804080 5c5237 fed47c 494dae ffa062 ffffff 68546d a9a483 e1c7ff 89364a 879edf 07f6e7
6bffc8 3a2995 b7798e ff4961 6b8e23 be9999 928b8d 4682b4 86c79c d1e28c 60246c 606060 40aa40 98fb98 d0e5e4 cebaab
98a140 747000 00728f 66669c fa8dff
"""
COCO = tuple((int(each[:2], 16), int(each[2:4], 16), int(each[4:], 16)) for each in COCO_HEX.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmenter:
    """`scores` gives (B, C, h, w) for pixel values (B, 3, H, W); `palette` (C, 3) uint8 has the classes' colors."""

    scores: Callable[[Any], Any]
    palette: Any
    device: AnnotatorDevice


def ade20k() -> Any:
    """(150, 3) uint8."""
    return np.array(defects.submodule("util").ade_palette(), np.uint8)


def coco() -> Any:
    """(133, 3) uint8."""
    return np.array(COCO, np.uint8)


def build_oneformer(folder: Path, device: AnnotatorDevice, palette: Any) -> Segmenter:
    defects.declare_torchvision_operators()
    from transformers import OneFormerForUniversalSegmentation

    network = place(pretrained(OneFormerForUniversalSegmentation, folder), device)
    task = _task(folder, network.config.task_seq_len)

    def scores(values: Any) -> Any:
        out = network(pixel_values=values, task_inputs=task.repeat(len(values), 1).to(values.device))
        return _semantic(out.class_queries_logits, out.masks_queries_logits)

    return Segmenter(scores=scores, palette=palette, device=device)


def _task(folder: Path, length: int) -> Any:
    """The task's text as tokens (1, length) int64 of CLIP's tokenizer."""
    from transformers import CLIPTokenizer

    merges = [line.split() for line in (folder / "merges.txt").read_text().splitlines() if not line.startswith("#")]
    tokenizer = CLIPTokenizer(
        vocab=json.loads((folder / "vocab.json").read_text()), merges=[(left, right) for left, right in merges]
    )
    return tokenizer(TASK, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _semantic(classes: Any, masks: Any) -> Any:
    """Scores (B, C, h, w) float32, the sum over queries of class probability times mask.

    `classes` (B, Q, C + 1) are logits, the last for no class; `masks` (B, Q, h, w) are logits.
    """
    import torch

    return torch.einsum("bqc,bqhw->bchw", classes.softmax(dim=-1)[..., :-1], masks.sigmoid())


def build_oneformer_ade20k(folder: Path, device: AnnotatorDevice) -> Segmenter:
    return build_oneformer(folder, device, ade20k())


def build_oneformer_coco(folder: Path, device: AnnotatorDevice) -> Segmenter:
    return build_oneformer(folder, device, coco())


def build_upernet(folder: Path, device: AnnotatorDevice) -> Segmenter:
    defects.declare_torchvision_operators()
    from transformers import UperNetForSemanticSegmentation

    network = place(pretrained(UperNetForSemanticSegmentation, folder), device)
    return Segmenter(scores=lambda values: network(pixel_values=values).logits, palette=ade20k(), device=device)


def segments(images: Sequence[Pixels], model: Segmenter) -> list[Pixels]:
    """(H, W, 3) uint8 of each image (H, W, 3): the color of each pixel's likeliest class."""
    import torch

    with inference(model.device):
        scores = model.scores(imagenet_normalize(to_tensor(images, model.device))).float()
        whole = torch.nn.functional.interpolate(scores, images[0].shape[:2], mode="bilinear", align_corners=False)
        labels = whole.argmax(dim=1).cpu().numpy()
    return [model.palette[each % len(model.palette)] for each in labels]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundRemover:
    """`scores` gives (side_px, side_px) float32 for values (1, 3, side_px, side_px) float32 of RGB.

    `mean` and `std` are of RGB in 0 to 1. `is_probability`: the scores are that, in 0 to 1, not to be spread over it.
    """

    scores: Callable[[Any], Any]
    side_px: int
    mean: Triple
    std: Triple
    is_probability: bool = False


def build_remover(
    folder: Path, device: AnnotatorDevice, *, file: str, side_px: int, mean: Triple, std: Triple
) -> BackgroundRemover:
    session = open_session(folder / file, device)
    name = session.get_inputs()[0].name
    return BackgroundRemover(
        scores=lambda values: answers_of(session.run(None, {name: values}))[0][0, 0],
        side_px=side_px,
        mean=mean,
        std=std,
    )


def build_selfie(folder: Path, device: AnnotatorDevice) -> BackgroundRemover:
    """MediaPipe's network for people, which runs in OpenCV."""
    network = read_network(folder / "selfie_segmentation.tflite")
    return BackgroundRemover(
        scores=lambda values: forward(network, values[0].transpose(1, 2, 0))[0][0, 0],
        side_px=256,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        is_probability=True,
    )


def remove_background(images: Sequence[Pixels], remover: BackgroundRemover, *, output: str) -> list[Pixels]:
    """Of each image (H, W, 3) uint8: (H, W, 4), the image, transparent where it is background; or a mask (H, W)."""
    masks = [_foreground(each, remover) for each in images]
    if output == MASK:
        return masks
    if output == BACKGROUND_MASK:
        return [255 - mask for mask in masks]
    return [np.dstack([each, mask]) for each, mask in zip(images, masks, strict=True)]


def _foreground(image: Pixels, remover: BackgroundRemover) -> Pixels:
    """A mask (H, W) uint8 of an image (H, W, 3): 255 in the foreground, 0 in the background."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (remover.side_px, remover.side_px), interpolation=cv2.INTER_LANCZOS4)
    values = small / (255 if remover.is_probability else max(int(small.max()), 1))
    values = ((values - np.array(remover.mean)) / np.array(remover.std)).transpose(2, 0, 1)[None].astype(np.float32)
    scores = remover.scores(values)
    if scores.shape != small.shape[:2]:
        raise ValueError(f"the network answers {scores.shape}, not a mask of {small.shape[:2]}")
    if not remover.is_probability:
        scores = (scores - scores.min()) / max(float(scores.max() - scores.min()), np.finfo(np.float32).tiny)
    mask = to_bytes(scores)
    whole: Pixels = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LANCZOS4)
    return whole


def _annotator(annotator_id: str, description: str, model: AnnotatorWeights, needs: tuple[str, ...]) -> Annotator:
    return Annotator(
        id=annotator_id,
        description=description,
        apply=segments,
        controlnets=("seg",),
        models=(model,),
        needs=("torch", "transformers", *needs),
        license="MIT",
        detect_resolution=512,
        has_labels=True,
    )


ONEFORMER_ADE20K = AnnotatorWeights(
    name="oneformer_ade20k", entry="annotator-oneformer-ade20k-hf", build=build_oneformer_ade20k
)
ONEFORMER_COCO = AnnotatorWeights(
    name="oneformer_coco", entry="annotator-oneformer-coco-hf", build=build_oneformer_coco
)
UPERNET = AnnotatorWeights(name="upernet", entry="annotator-upernet-hf", build=build_upernet)

ANNOTATORS = (
    _annotator(
        "seg_ofade20k", "What each pixel shows, in ADE20K's 150 colors", ONEFORMER_ADE20K, ("controlnet_aux", "scipy")
    ),
    _annotator("seg_ofcoco", "What each pixel shows, in COCO's 133 colors", ONEFORMER_COCO, ("scipy",)),
    _annotator("seg_ufade20k", "What each pixel shows, in ADE20K's 150 colors", UPERNET, ("controlnet_aux",)),
)

U2NET = AnnotatorWeights(
    name="u2net",
    entry="annotator-u2net",
    build=partial(build_remover, file="u2net.onnx", side_px=320, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    uses_gpu=False,
)
ISNET = AnnotatorWeights(
    name="isnet-general-use",
    entry="annotator-isnet",
    build=partial(
        build_remover, file="isnet-general-use.onnx", side_px=1024, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0)
    ),
    uses_gpu=False,
)

SELFIE = AnnotatorWeights(
    name="selfie_segmentation", entry="annotator-selfie-segmentation", build=build_selfie, uses_gpu=False
)

REMOVE_BACKGROUND = Annotator(
    id="remove_background",
    description="The image with a transparent background, or the mask of it",
    apply=remove_background,
    models=(U2NET, ISNET, SELFIE),
    parameters=(
        Parameter(
            name="output",
            default=IMAGE,
            choices=(IMAGE, MASK, BACKGROUND_MASK),
            description="The transparent image, a mask that is white on the subject, or one that is white around it",
        ),
    ),
    needs=("onnxruntime",),
)
