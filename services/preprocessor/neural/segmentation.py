"""What every pixel shows, in the colours of the segmentation ControlNet: OneFormer and UperNet of transformers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.device import Device
from services.preprocessor.neural import defects
from services.preprocessor.neural.depth import for_imagenet
from services.preprocessor.neural.palettes import COCO
from services.preprocessor.neural.running import place, running, to_tensor
from services.preprocessor.weights import Model

# What OneFormer is told to do, in the words that it was trained with.
TASK = "the task is semantic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmenter:
    """`scores` gives (B, classes, h, w) for pixel values (B, 3, H, W)."""

    scores: Callable[[Any], Any]
    palette: Any
    device: Device


def ade20k() -> Any:
    return np.array(defects.submodule("util").ade_palette(), np.uint8)


def coco() -> Any:
    return np.array(COCO, np.uint8)


def build_oneformer(folder: Path, device: Device, palette: Any) -> Segmenter:
    defects.declare_torchvision_operators()
    from transformers import OneFormerForUniversalSegmentation

    network = place(OneFormerForUniversalSegmentation.from_pretrained(folder, local_files_only=True), device)
    task = _task(folder, network.config.task_seq_len)

    def scores(values: Any) -> Any:
        out = network(pixel_values=values, task_inputs=task.repeat(len(values), 1).to(values.device))
        return _semantic(out.class_queries_logits, out.masks_queries_logits)

    return Segmenter(scores=scores, palette=palette, device=device)


def _task(folder: Path, length: int) -> Any:
    """What it is told, (1, length), in the numbers of CLIP's tokenizer."""
    from transformers import CLIPTokenizer

    merges = [line.split() for line in (folder / "merges.txt").read_text().splitlines() if not line.startswith("#")]
    tokenizer = CLIPTokenizer(
        vocab=json.loads((folder / "vocab.json").read_text()), merges=[(left, right) for left, right in merges]
    )
    return tokenizer(TASK, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _semantic(classes: Any, masks: Any) -> Any:
    """Each query's class, without the last that stands for nothing, times where its mask is."""
    import torch

    return torch.einsum("bqc,bqhw->bchw", classes.softmax(dim=-1)[..., :-1], masks.sigmoid())


def build_oneformer_ade20k(folder: Path, device: Device) -> Segmenter:
    return build_oneformer(folder, device, ade20k())


def build_oneformer_coco(folder: Path, device: Device) -> Segmenter:
    return build_oneformer(folder, device, coco())


def build_upernet(folder: Path, device: Device) -> Segmenter:
    defects.declare_torchvision_operators()
    from transformers import UperNetForSemanticSegmentation

    network = place(UperNetForSemanticSegmentation.from_pretrained(folder, local_files_only=True), device)
    return Segmenter(scores=lambda values: network(pixel_values=values).logits, palette=ade20k(), device=device)


def segments(pictures: Sequence[Pixels], model: Segmenter) -> list[Pixels]:
    """(H, W, 3), the colour of each pixel's likeliest class."""
    import torch

    with running(model.device):
        scores = model.scores(for_imagenet(to_tensor(pictures, model.device))).float()
        whole = torch.nn.functional.interpolate(scores, pictures[0].shape[:2], mode="bilinear", align_corners=False)
        labels = whole.argmax(dim=1).cpu().numpy()
    return [model.palette[each % len(model.palette)] for each in labels]


def _annotator(annotator_id: str, description: str, model: Model, needs: tuple[str, ...]) -> Annotator:
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


ONEFORMER_ADE20K = Model(name="oneformer_ade20k", entry="annotator-oneformer-ade20k-hf", build=build_oneformer_ade20k)
ONEFORMER_COCO = Model(name="oneformer_coco", entry="annotator-oneformer-coco-hf", build=build_oneformer_coco)
UPERNET = Model(name="upernet", entry="annotator-upernet-hf", build=build_upernet)

ANNOTATORS = (
    _annotator("seg_ofade20k", "What is where, in ADE20K's 150 colours", ONEFORMER_ADE20K, ("controlnet_aux", "scipy")),
    _annotator("seg_ofcoco", "What is where, in COCO's 133 colours", ONEFORMER_COCO, ("scipy",)),
    _annotator("seg_ufade20k", "What is where, in ADE20K's 150 colours", UPERNET, ("controlnet_aux",)),
)
