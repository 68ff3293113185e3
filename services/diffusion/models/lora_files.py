"""LoRA files of all common formats: kohya, diffusers, PEFT, LoCon and LyCORIS. From a file to layers of tensors.

Module names are matched with dots and underscores as equal, in diffusers' names and in the LDM layout's.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from services.diffusion.models.entries import LoraEntry
from services.diffusion.models.faults import CONTENT_ERRORS, MissingFile, UnusableModel, damaged, is_of_device
from services.diffusion.models.lora_forms import LoraLayer
from services.diffusion.models.lora_names import UnsupportedForm, lora_names, plain_name
from services.diffusion.models.name_patterns import BadPattern
from services.diffusion.models.peft_config import BadPeftConfig, PeftScales, adapter_files, peft_scales
from services.diffusion.models.single_files import read_header
from services.weights.loading import load_safetensors
from services.weights.references.tensors import BadHeader


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraWeights:
    """Layers by part (`unet`, `text_encoder`, `text_encoder_2`) and by the module's name as `plain_name` has it."""

    entry: LoraEntry
    layers: Mapping[str, Mapping[str, LoraLayer]]


def read_lora(entry: LoraEntry) -> LoraWeights:
    """UnusableModel for a damaged file, and for a form that is not supported."""
    try:
        return LoraWeights(entry=entry, layers=_layers(entry))
    except UnsupportedForm as form:
        raise UnusableModel(f"LoRA {entry.id} is {form}", field="loras") from form
    except (BadPeftConfig, BadPattern) as error:
        raise UnusableModel(f"LoRA {entry.id} cannot be loaded: {error}", field="loras") from error
    except (*CONTENT_ERRORS, BadHeader) as error:
        if is_of_device(error):
            raise
        message = f"LoRA {entry.id} cannot be loaded: its file is missing or damaged"
        raise damaged(entry.id, error, message) from error


def _layers(entry: LoraEntry) -> Mapping[str, Mapping[str, LoraLayer]]:
    layers: dict[str, dict[str, LoraLayer]] = defaultdict(dict)
    for head, file in adapter_files(entry.path).items():
        found = {f"{head}{name}": tensor for name, tensor in load_safetensors(file).items()}
        scales = peft_scales(file, read_header(file).metadata)
        grouped: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        for name, meant in lora_names(found).items():
            grouped[meant.part, meant.module][meant.what] = found[name]
        for (part, module), tensors in grouped.items():
            layers[part][plain_name(module)] = _layer(part, module, tensors, scales)
    if not layers:
        raise MissingFile("no adapter")
    return layers


def _layer(part: str, module: str, tensors: Mapping[str, Tensor], scales: PeftScales) -> LoraLayer:
    return LoraLayer(name=module, tensors=tensors, peft=scales(part, module))
