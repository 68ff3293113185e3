"""ControlNets in single files: told from their headers, and what makes one that is not used. Loads no torch.

Families of ControlNets that take more than an image, or that have fewer layers, are refused by name: an ordinary
ControlNet that is made of their tensors would condition wrongly.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from services.diffusion.models.entries import ControlNetEntry, controlnet_entry, own_name
from services.diffusion.models.recipes import Config, UnfitFolder, shipped

Shapes = Mapping[str, tuple[int, ...]]
# Before the names of its tensors in the LDM layout.
CONTROL = "control_model."
_FIRST_NAMES = (CONTROL, "controlnet_cond_embedding.", "input_hint_block.")
# ControlNets of other kinds: what it is, what a tensor's name has.
_OTHERS = (
    ("a union ControlNet (or promax), which must be told the kind of each control image", re.compile(
        r"(^|\.)(task_embedding|control_add_embedding\.|transformer_layes\.|spatial_ch_projs\.)")),
    ("a Control-LoRA", re.compile(r"(^|\.)lora_controlnet$")),
    ("a ControlNet-XS", re.compile(r"(^|\.)(enc_zero_convs_out|dec_zero_convs_out|ctrl_to_base|base_to_ctrl)")),
    ("a SparseCtrl of AnimateDiff", re.compile(r"(^|\.)motion_modules\.")),
    ("a ControlNet++ of several controls", re.compile(r"(^|\.)(control_type_proj|control_type_embed)")),
)  # fmt: skip
# The mark of a file whose tensors are differences to the base model's.
DIFFERENCE = "difference"
DIFFERENCE_NOTE = "its tensors are a difference to the base model's, which are added when it is used"
_BASES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_TO_KEY = "attn2.to_k.weight"
# Only SDXL's take the image's size.
_SIZE_EMBEDDING = ("add_embedding.linear_1.weight", "label_emb.0.0.weight")
_HINTS = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
_LATENTS = ("conv_in.weight", "input_blocks.0.0.weight")
_TRANSFORMER = re.compile(r"^(.*transformer_blocks\.\d+)\.")
# How many transformer blocks SDXL has before its UNet's way up: in two blocks of two each, and in the middle.
_SDXL_TRANSFORMERS = 2 * 2 + 2 * 10 + 10
# Nets that condition with their residuals' mean over the image.
_POOLING = "shuffle"


def is_controlnet(names: Collection[str]) -> bool:
    """Also where a whole Stable Diffusion is in the same file, as in the first ControlNets."""
    return any(name.startswith(_FIRST_NAMES) for name in names)


def refuse_other_controlnet(names: Collection[str]) -> None:
    """UnfitFolder for a ControlNet that takes more than one image."""
    for what, mark in _OTHERS:
        if any(mark.search(name) for name in names):
            raise UnfitFolder(f"it is {what}; that is not supported")


def controlnet_of_file(path: Path, shapes: Shapes, *, size_bytes: int) -> ControlNetEntry:
    """UnfitFolder for one that is not supported."""
    # Marks of other kinds may stand outside the prefix.
    refuse_other_controlnet(shapes)
    own = _own_tensors(shapes)
    base = _base_of(own)
    _check_inputs(own)
    config = control_config(base, is_pooling=_POOLING in own_name(path))
    return with_marks(controlnet_entry(path, config, size_bytes), own)


def with_marks(entry: ControlNetEntry, names: Collection[str]) -> ControlNetEntry:
    """`names`: of the tensors."""
    is_difference = any(name.removeprefix(CONTROL) == DIFFERENCE for name in names)
    return replace(entry, is_difference=True, note=DIFFERENCE_NOTE) if is_difference else entry


def _own_tensors(shapes: Shapes) -> Shapes:
    """Without the base model that may be in the file, and without the prefix."""
    has_prefix = any(name.startswith(CONTROL) for name in shapes)
    return {
        name.removeprefix(CONTROL): shape
        for name, shape in shapes.items()
        if not has_prefix or name.startswith(CONTROL) or name == DIFFERENCE
    }


def _base_of(own: Shapes) -> str:
    width = next((shape[-1] for name, shape in own.items() if name.endswith(_TO_KEY) and shape), 0)
    is_sdxl = width == 2048 or any(name in own for name in _SIZE_EMBEDDING)
    if is_sdxl and len({found[1] for name in own if (found := _TRANSFORMER.match(name))}) < _SDXL_TRANSFORMERS:
        raise UnfitFolder(
            "it is an SDXL ControlNet with fewer layers than SDXL (such as small or mid), which needs a folder with its"
            " config.json"
        )
    base = _BASES.get(width)
    if base is None:
        raise UnfitFolder("its shapes are those of no known ControlNet")
    return base


def _check_inputs(own: Shapes) -> None:
    for names, channels, what in ((_HINTS, 3, "control image"), (_LATENTS, 4, "latents")):
        for name in names:
            shape = own.get(name, (0, channels))
            if len(shape) < 2 or shape[1] != channels:
                raise UnfitFolder(f"it is a ControlNet whose {what} has other than {channels} channels")


def control_config(base: str, *, is_pooling: bool) -> Config:
    """A ControlNet is a copy of its base's UNet."""
    unet = shipped(base).unet
    shared = {key: value for key, value in unet.items() if key not in _NOT_CONTROL}
    return {
        **shared,
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "global_pool_conditions": is_pooling,
    }


_NOT_CONTROL = frozenset({"_class_name", "center_input_sample", "out_channels", "sample_size", "up_block_types"})
