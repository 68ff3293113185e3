"""From a model's files to its modules in memory: offline, built empty and given the files' own tensors.

The modules lie in RAM; which of them are on a device, and for how long, is not decided here.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fanlight.errors import FanlightError, NodeFault
from services.diffusion.models import tensors
from services.diffusion.models.classes import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from services.diffusion.models.clip import ClipText
from services.diffusion.models.empty import built_empty
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, VaeEntry
from services.diffusion.models.recipes import Config, TextRecipe, UnfitFolder, read_json
from services.diffusion.models.residency import Lease
from services.diffusion.models.shadow import doubled
from services.diffusion.models.shortage import is_shortage
from services.diffusion.models.tokenizers import ClipTokenizer
from services.kernel.logs import get_logger
from services.weights.tensors import BadHeader

log = get_logger()

# Models of so many configs are kept built and empty.
EMPTY_LIMIT = 32

_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError, UnfitFolder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where a model is loaded to: as what numbers, and what is asked for its bytes before they are there."""

    dtype: torch.dtype
    reserve: Callable[[int], None] = lambda size_bytes: None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """One of a checkpoint's text encoders, and what the checkpoint takes from it."""

    tokenizer: ClipTokenizer
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


def load_unet(entry: CheckpointEntry, room: Room) -> Any:
    """NodeFault where a file is damaged, FailedPrecondition where only pickles are there; so for all of these."""
    name, config = f"{entry.id}/unet", entry.recipe.unet
    with _reported(name):
        found = (
            tensors.ldm_unet(entry.path, config) if entry.is_ldm else tensors.folder_tensors(entry.path / "unet", name)
        )
        return filled(_empty(UNet2DConditionModel, config), found, room)


def load_vae(entry: CheckpointEntry, room: Room) -> Any:
    name, config = f"{entry.id}/vae", entry.recipe.vae
    with _reported(name):
        if entry.is_ldm:
            found = tensors.ldm_vae(entry.path, config)
        else:
            found = tensors.vae_tensors(tensors.folder_tensors(entry.path / "vae", name))
        return _filled_vae(config, found, room)


def vae_config(entry: VaeEntry, own: Config) -> Config:
    """`own`: the config of the checkpoint's VAE, for a file that comes without one."""
    with _reported(f"vae {entry.id}"):
        return read_json(entry.path / "config.json") if entry.path.is_dir() else own


def load_separate_vae(entry: VaeEntry, config: Config, room: Room) -> Any:
    with _reported(f"vae {entry.id}"):
        if entry.is_tiny:
            return _tiny_vae(entry, config, room)
        if entry.path.is_dir():
            found = tensors.vae_tensors(tensors.folder_tensors(entry.path, f"vae {entry.id}"))
        else:
            found = tensors.vae_file(entry.path, config)
        return _filled_vae(config, found, room)


def load_text(entry: CheckpointEntry, recipe: TextRecipe, room: Room) -> Any:
    name = f"{entry.id}/{recipe.part}"
    with _reported(name):
        model = _empty(ClipText, recipe.config)
        if entry.is_ldm:
            found = tensors.ldm_text(entry.path, recipe, model)
        else:
            found = tensors.text_tensors(tensors.folder_tensors(entry.path / recipe.part, name))
        return filled(model, found, room)


def load_controlnet(entry: ControlNetEntry, room: Room) -> Any:
    name = f"controlnet {entry.id}"
    with _reported(name):
        if entry.path.is_dir():
            found = tensors.folder_tensors(entry.path, name)
        else:
            found = tensors.control_file(entry.path, entry.config)
        return filled(_empty(ControlNetModel, entry.config), found, room)


def filled(model: Any, found: Mapping[str, Tensor], room: Room) -> Any:
    """The empty model's double with these tensors in it, not copied where they fit the type.

    ValueError where one is missing or of another shape. Raises as `room.reserve` does before anything is copied.
    """
    lacking = [name for name, _ in model.named_parameters() if name not in found]
    if lacking:
        raise ValueError(f"{len(lacking)} tensors are missing, such as {lacking[0]}")

    numbers = sum(parameter.numel() for parameter in model.parameters())
    room.reserve(numbers * room.dtype.itemsize)

    def put(name: str, empty: Tensor) -> Tensor:
        if not empty.is_floating_point():
            return _computed(name, empty)
        if found[name].shape != empty.shape:
            raise ValueError(f"{name} has another shape")
        return found[name].to(room.dtype)

    return doubled(model, put)


def _computed(name: str, empty: Tensor) -> Tensor:
    """CLIP's numbers of positions, which newer files lack."""
    assert name.endswith("position_ids"), name
    return torch.arange(empty.shape[-1]).expand(empty.shape)


def _empty(kind: Any, config: Config) -> Any:
    """To be filled; the same one for all of its kind, as building one costs more than filling it."""
    return _built(kind, json.dumps(config, sort_keys=True))


@lru_cache(maxsize=EMPTY_LIMIT)
def _built(kind: Any, config: str) -> Any:
    told = json.loads(config)
    with built_empty():
        made = kind.from_config(told)
    return made.eval()


def _filled_vae(config: Config, found: Mapping[str, Tensor], room: Room) -> Any:
    """Without its encoder where the files have none, as a store that fetched for text2img alone has them."""
    vae = doubled(_empty(AutoencoderKL, config), lambda name, tensor: tensor)
    if not any(name.startswith("encoder.") for name in found):
        vae.encoder = vae.quant_conv = None
    return filled(vae, found, room)


def _tiny_vae(entry: VaeEntry, config: Config, room: Room) -> Any:
    if entry.path.is_dir():
        return filled(_empty(AutoencoderTiny, config), tensors.folder_tensors(entry.path, entry.id), room)
    return filled(_empty(AutoencoderTiny, {}), tensors.tiny_vae_file(entry.path), room)


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Errors of files as ours. A cause may name paths, so only the log gets it."""
    try:
        yield
    except BadHeader as error:
        raise _damaged(name, error) from error
    except FanlightError:
        raise
    except _DAMAGE as error:
        if is_shortage(error):
            raise
        raise _damaged(name, error) from error


def _damaged(name: str, cause: Exception) -> NodeFault:
    log.warning("load_failed", model=name, cause=repr(cause))
    return NodeFault(f"{name} cannot be loaded: a file is missing, damaged or of another model")
