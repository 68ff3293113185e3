"""From a folder in diffusers' layout to models in memory: offline, safetensors only. Nothing else reads weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, UnfitFolder, read_json
from services.diffusion.schedulers.make import base_config
from services.kernel.errors import FailedPrecondition, NodeFault, ResourceExhausted
from services.kernel.logs import get_logger

log = get_logger()

_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """One of a checkpoint's text encoders, and what the checkpoint takes from it."""

    tokenizer: Any
    encoder: Any
    # The states before the last layer, not normalised (SDXL), instead of the last ones.
    is_penultimate: bool = False
    # Its `text_embeds` are the prompt's pooled vector (the last encoder of SDXL).
    is_pooled: bool = False
    # Which ids of its table the textual inversions added, by name.
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """How many tokens it takes at once, its two marks included."""
        positions: int = self.encoder.config.max_position_embeddings
        return positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. Shared by all who paint with it, changed by none."""

    entry: CheckpointEntry
    # One, or two for SDXL base.
    texts: tuple[TextPart, ...]
    unet: Any
    vae: Any
    # How many numbers the UNet has.
    weights: int
    # As the scheduler that the checkpoint was saved with understands it.
    scheduler_config: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.unet.dtype
        return dtype


def load_checkpoint(entry: CheckpointEntry, device: torch.device) -> Checkpoint:
    """NodeFault where a file is damaged, FailedPrecondition where only pickles are there, ResourceExhausted."""
    transformers_logging.disable_progress_bar()
    folder = entry.folder
    unet = _weights(UNet2DConditionModel, folder / "unet", f"{entry.id}/unet", device)
    return Checkpoint(
        entry=entry,
        texts=(
            TextPart(
                tokenizer=_tokenizer(folder / "tokenizer", entry.id),
                encoder=_weights(CLIPTextModel, folder / "text_encoder", f"{entry.id}/text_encoder", device),
            ),
        ),
        unet=unet,
        weights=sum(tensor.numel() for tensor in unet.parameters()),
        vae=_weights(AutoencoderKL, folder / "vae", f"{entry.id}/vae", device),
        scheduler_config=_scheduler_config(folder / "scheduler" / "scheduler_config.json", entry.id),
    )


def load_controlnet(entry: ControlNetEntry, device: torch.device) -> Any:
    """Raises as `load_checkpoint` does."""
    return _weights(ControlNetModel, entry.folder, f"controlnet {entry.id}", device)


def _weights(kind: Any, folder: Path, name: str, device: torch.device) -> Any:
    variant = _variant(folder, name)
    dtype_name = "dtype" if kind is CLIPTextModel else "torch_dtype"
    options = {dtype_name: dtype_on(device), "variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        model, report = kind.from_pretrained(str(folder), output_loading_info=True, **options)
        if lacking := [*report["missing_keys"], *report["mismatched_keys"]]:
            raise ValueError(f"{len(lacking)} tensors are missing or of another shape")
        return model.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError as error:
        raise ResourceExhausted(f"the device has no room for {name}") from error
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _variant(folder: Path, name: str) -> str | None:
    """`fp16` where the weights lie only so. FailedPrecondition where there are none but pickles."""
    names = [file.name for file in folder.glob("*.safetensors*")]
    if any(".fp16." not in each for each in names):
        return None
    if names:
        return "fp16"
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        raise FailedPrecondition(
            f"{name} has pickles only, which are not loaded; give it as safetensors", field="model"
        )
    raise _damaged(name, FileNotFoundError("no safetensors"))


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.float16


def _tokenizer(folder: Path, model_id: str) -> Any:
    try:
        for file in folder.glob("*.json"):
            read_json(file)  # of a broken one the tokenizers library makes a bare Exception
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (UnfitFolder, *_DAMAGE) as error:
        raise _damaged(f"{model_id}/tokenizer", error) from error


def _scheduler_config(file: Path, model_id: str) -> Mapping[str, Any]:
    try:
        return base_config(read_json(file))
    except (UnfitFolder, *_DAMAGE) as error:
        raise _damaged(f"{model_id}/scheduler", error) from error


def _damaged(name: str, cause: Exception) -> NodeFault:
    """The cause may name paths, so only the log gets it."""
    log.warning("load_failed", model=name, cause=repr(cause))
    return NodeFault(f"{name} cannot be loaded: a file is missing, damaged or of another model")
