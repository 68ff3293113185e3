"""From a model's files to its modules in memory: offline, built empty and given the files' own tensors.

The modules lie in RAM; which of them are on a device, and for how long, is not decided here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from services.diffusion.models import tensors
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, VaeEntry
from services.diffusion.models.recipes import Config, TextRecipe, UnfitFolder, read_json
from services.diffusion.models.residency import Lease
from services.kernel.errors import FanlightError, NodeFault, ResourceExhausted
from services.kernel.logs import get_logger

log = get_logger()

_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError, UnfitFolder)


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Checkpoint:
    """A checkpoint in memory with what one picture adds to it. Changed by none; what it holds stays while it lives."""

    entry: CheckpointEntry
    # One, or two for SDXL base.
    texts: tuple[TextPart, ...]
    unet: Any
    vae: Any
    # The ControlNets of the picture, in order.
    nets: tuple[Any, ...] = ()
    # A TAESD for previews, where one is held.
    tiny_vae: Any = None
    # How many numbers the UNet has.
    weights: int
    # As the scheduler that the checkpoint was saved with understands it.
    scheduler_config: Mapping[str, Any]
    # Keeps all of this in memory.
    lease: Lease

    @property
    def can_encode(self) -> bool:
        """Whether its VAE turns pictures into latents too; one that was fetched for text2img alone does not."""
        return self.vae.encoder is not None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.unet.dtype
        return dtype


def load_unet(entry: CheckpointEntry, dtype: torch.dtype) -> Any:
    """NodeFault where a file is damaged, FailedPrecondition where only pickles are there; so for all of these."""
    name, config = f"{entry.id}/unet", entry.recipe.unet
    with _reported(name):
        found = (
            tensors.ldm_unet(entry.path, config) if entry.is_ldm else tensors.folder_tensors(entry.path / "unet", name)
        )
        return filled(_empty(UNet2DConditionModel, config), found, dtype)


def load_vae(entry: CheckpointEntry, dtype: torch.dtype) -> Any:
    name, config = f"{entry.id}/vae", entry.recipe.vae
    with _reported(name):
        if entry.is_ldm:
            found = tensors.ldm_vae(entry.path, config)
        else:
            found = tensors.vae_tensors(tensors.folder_tensors(entry.path / "vae", name))
        return _filled_vae(config, found, dtype)


def load_separate_vae(entry: VaeEntry, own: Config, dtype: torch.dtype) -> Any:
    """`own`: the config of the checkpoint's VAE, for a file that comes without one."""
    with _reported(f"vae {entry.id}"):
        config = read_json(entry.path / "config.json") if entry.path.is_dir() else own
        if entry.is_tiny:
            return _tiny_vae(entry, config, dtype)
        if entry.path.is_dir():
            found = tensors.vae_tensors(tensors.folder_tensors(entry.path, f"vae {entry.id}"))
        else:
            found = tensors.vae_file(entry.path, config)
        return _filled_vae(config, found, dtype)


def load_text(entry: CheckpointEntry, recipe: TextRecipe, dtype: torch.dtype) -> Any:
    name = f"{entry.id}/{recipe.part}"
    with _reported(name):
        has_projection = "CLIPTextModelWithProjection" in recipe.config.get("architectures", ())
        kind = CLIPTextModelWithProjection if has_projection else CLIPTextModel
        with torch.device("meta"):
            model = kind(CLIPTextConfig(**recipe.config))
        if entry.is_ldm:
            found = tensors.ldm_text(entry.path, recipe, model)
        else:
            found = tensors.text_tensors(tensors.folder_tensors(entry.path / recipe.part, name), model)
        return filled(model, found, dtype)


def load_controlnet(entry: ControlNetEntry, dtype: torch.dtype) -> Any:
    name = f"controlnet {entry.id}"
    with _reported(name):
        if entry.path.is_dir():
            found = tensors.folder_tensors(entry.path, name)
        else:
            found = tensors.control_file(entry.path, entry.config)
        return filled(_empty(ControlNetModel, entry.config), found, dtype)


def filled(model: Any, found: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The empty model with these tensors in it, not copied where they fit the type. ValueError where one is missing."""
    wanted = {name: found[name].to(dtype) for name in model.state_dict() if name in found}
    if lacking := [name for name, _ in model.named_parameters() if name not in wanted]:
        raise ValueError(f"{len(lacking)} tensors are missing, such as {lacking[0]}")
    model.load_state_dict(wanted, strict=False, assign=True)
    _fill_buffers(model)
    return model.eval().requires_grad_(False)


def _fill_buffers(model: Any) -> None:
    """What is computed and not saved: CLIP's numbers of positions."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids", name
                module.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)


def _empty(kind: Any, config: Config) -> Any:
    with torch.device("meta"):
        return kind.from_config(dict(config))


def _filled_vae(config: Config, found: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Without its encoder where the files have none, as a store that fetched for text2img alone has them."""
    vae = _empty(AutoencoderKL, config)
    if not any(name.startswith("encoder.") for name in found):
        vae.encoder = vae.quant_conv = None
    return filled(vae, found, dtype)


def _tiny_vae(entry: VaeEntry, config: Config, dtype: torch.dtype) -> Any:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    if entry.path.is_dir():
        return filled(_empty(AutoencoderTiny, config), tensors.folder_tensors(entry.path, entry.id), dtype)
    with torch.device("meta"):
        model = AutoencoderTiny()
    return filled(model, tensors.tiny_vae_file(entry.path), dtype)


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Errors of files as ours. A cause may name paths, so only the log gets it."""
    try:
        yield
    except FanlightError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceExhausted(f"the device has no room for {name}") from error
    except _DAMAGE as error:
        log.warning("load_failed", model=name, cause=repr(error))
        raise NodeFault(f"{name} cannot be loaded: a file is missing, damaged or of another model") from error
