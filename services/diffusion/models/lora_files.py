"""LoRA files of all common formats: kohya, diffusers, PEFT, LoCon and LyCORIS. From a file to layers of tensors.

Module names are matched with dots and underscores as equal, in diffusers' names and in the LDM layout's.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from services.diffusion.models.entries import LoraEntry
from services.diffusion.models.faults import CONTENT_ERRORS, UnusableModel, damaged, is_of_device
from services.diffusion.models.single_files import read_header
from services.weights.loading import load_safetensors
from services.weights.references.tensors import BadHeader

# What a tensor is, by the last part of its name in any format.
_ENDINGS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "hada_t1": "hada_t1",
    "hada_t2": "hada_t2",
    "lokr_w1": "lokr_w1",
    "lokr_w1_a": "lokr_w1_a",
    "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2",
    "lokr_w2_a": "lokr_w2_a",
    "lokr_w2_b": "lokr_w2_b",
    "lokr_t2": "lokr_t2",
}
# Known and not supported: they multiply weights, or are for layers of another kind.
_OTHER_FORMS = {
    **dict.fromkeys((".oft_diag", ".oft_blocks", ".oft_R.weight", ".oft_r.weight"), "an OFT"),
    **dict.fromkeys((".boft_R", ".boft_s"), "a BOFT"),
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "a GLoRA"),
    **dict.fromkeys((".on_input", ".ia3_l"), "an IA3"),
}
# `attn1.processor.to_q_lora.down.weight`, as diffusers wrote before PEFT.
_PROCESSOR = re.compile(r"^(.*)\.processor\.(to_\w+)_lora\.(down|up)\.weight$")
_HEADS = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("lycoris_", "unet"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
)
# Tensors that change no layer.
_IGNORED = re.compile(r"^(lora_prior_|bundle_emb)|position_ids$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayer:
    """A LoRA's tensors for one module, by the values of `_ENDINGS`; for a LoRA `down` (r, in) and `up` (out, r)."""

    # Its name in the file.
    name: str
    tensors: Mapping[str, Tensor]
    # PEFT's alpha, which is in the file's metadata.
    alpha: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """Layers by part (`unet`, `text_encoder`, `text_encoder_2`) and by the module's name as `plain_name` has it."""

    entry: LoraEntry
    layers: Mapping[str, Mapping[str, LoraLayer]]


def read_lora(entry: LoraEntry) -> LoraWeights:
    """UnusableModel for a damaged file, and for a form that is not supported."""
    try:
        return LoraWeights(entry=entry, layers=_layers(entry))
    except (*CONTENT_ERRORS, BadHeader) as error:
        if is_of_device(error):
            raise
        message = f"LoRA {entry.id} cannot be loaded: its file is missing or damaged"
        raise damaged(entry.id, error, message) from error


def _layers(entry: LoraEntry) -> Mapping[str, Mapping[str, LoraLayer]]:
    found, alphas = load_safetensors(entry.path), _peft_alphas(entry.path)
    grouped: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in found.items():
        if not _IGNORED.search(name):
            module, what = _split(name, entry)
            grouped[_part_of(module)][what] = tensor
    layers: dict[str, dict[str, LoraLayer]] = defaultdict(dict)
    for (part, module), tensors in grouped.items():
        layers[part][plain_name(module)] = LoraLayer(name=module, tensors=tensors, alpha=alphas(f"{part}.{module}"))
    return layers


def plain_name(module: str) -> str:
    """With underscores for dots, and without `text_model` before a text encoder's names."""
    return module.replace(".", "_").removeprefix("text_model_")


def _split(name: str, entry: LoraEntry) -> tuple[str, str]:
    """The module's name and what the tensor is to it."""
    name = name.removeprefix("base_model.model.")
    if found := _PROCESSOR.match(name):
        target = "to_out.0" if found[2] == "to_out" else found[2]
        return f"{found[1]}.{target}", found[3]
    parts = name.replace(".default.", ".").split(".")
    for length in (3, 2, 1):
        if what := _ENDINGS.get(".".join(parts[-length:])):
            return ".".join(parts[:-length]), what
    form = next((form for mark, form in _OTHER_FORMS.items() if name.endswith(mark)), "of an unknown form")
    raise UnusableModel(
        f"LoRA {entry.id} is {form}, which is not supported (tensor {name[:80]}); LoRA, LoCon, LoHa, LoKr and DoRA are",
        field="loras",
    )


def _part_of(module: str) -> tuple[str, str]:
    for head, part in _HEADS:
        if module.startswith(head):
            return part, module.removeprefix(head)
    return "unet", module


def _peft_alphas(file: Path) -> Any:
    """From a layer's full name to its alpha in PEFT's configuration in the metadata; None where there is none."""
    saved = read_header(file).metadata.get("lora_adapter_metadata", "")
    config: Mapping[str, Any] = json.loads(saved) if saved else {}

    def alpha(name: str) -> float | None:
        part, _, module = name.partition(".")
        patterns = config.get(f"{part}.alpha_pattern") or {}
        given = patterns.get(module, config.get(f"{part}.lora_alpha"))
        return None if given is None else float(given)

    return alpha


def unmatched(lora: LoraWeights, names: Mapping[str, str], part: str, checkpoint_id: str) -> UnusableModel:
    """The error for a LoRA with layers that the checkpoint lacks."""
    layers = [layer.name for name, layer in lora.layers[part].items() if name not in names]
    return UnusableModel(
        f"LoRA {lora.entry.id} is of another base than {checkpoint_id}: that has no {layers[0][:80]}"
        + (f" and lacks {len(layers) - 1} other of its layers" if len(layers) > 1 else ""),
        field="loras",
    )
