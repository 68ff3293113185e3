"""From a model's files to its modules in RAM: offline, built empty and given the files' own tensors.

Which modules are on a device, and for how long, is not decided here. Of pickles nothing but tensors is taken.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fanlight.errors import FanlightError
from services.diffusion.diffusers_import import ROOT, import_diffusers_module
from services.diffusion.models.clip import ClipText
from services.diffusion.models.controlnet_files import CONTROL
from services.diffusion.models.device import shallow_copy_module
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, VaeEntry
from services.diffusion.models.faults import (
    CAUSE_LIMIT,
    CONTENT_ERRORS,
    MissingFile,
    UnusableModel,
    damaged,
    is_of_device,
)
from services.diffusion.models.ldm_names import TEXT_PREFIXES
from services.diffusion.models.leftovers import is_harmless_in_text, is_much, no_place
from services.diffusion.models.quantized import dequantized
from services.diffusion.models.recipes import Config, TextRecipe, read_json
from services.kernel.logs import get_logger
from services.weights.loading import load_checkpoint, load_safetensors
from services.weights.references.tensors import BadHeader

# It warns of options that configs of newer classes have.
logging.getLogger(f"{ROOT}.configuration_utils").setLevel(logging.ERROR)

AutoencoderKL = import_diffusers_module("models.autoencoders.autoencoder_kl").AutoencoderKL
AutoencoderTiny = import_diffusers_module("models.autoencoders.autoencoder_tiny").AutoencoderTiny
ControlNetModel = import_diffusers_module("models.controlnets.controlnet").ControlNetModel
UNet2DConditionModel = import_diffusers_module("models.unets.unet_2d_condition").UNet2DConditionModel

log = get_logger()

# For how many configs empty modules are cached.
EMPTY_LIMIT = 32
Tensors = dict[str, Tensor]
# Names of attention layers in older VAE files.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VARIANT = re.compile(r"[._](fp16|bf16|non_ema|ema)[._-]")
_FIRST_STAGE = "first_stage_model."
_STATISTICS = ("latents_mean", "latents_std", "scaling_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTarget:
    """The type that a model is loaded as, and what is called with its size before its bytes are allocated."""

    dtype: torch.dtype
    reserve: Callable[[int], None] = lambda size_bytes: None


def load_unet(entry: CheckpointEntry, target: LoadTarget) -> Any:
    """UnusableModel for a damaged file, or where there are only pickles; so for all loaders here."""
    name, config = f"{entry.id}/unet", entry.recipe.unet
    with _translate_damage(name):
        if entry.is_ldm:
            found = _ldm_unet_tensors(entry.path, config, target)
        else:
            found = _plain(folder_tensors(entry.path / "unet", name), target)
        return fill_module(_empty(UNet2DConditionModel, config), found, target, name=name)


def load_vae(entry: CheckpointEntry, target: LoadTarget) -> Any:
    name, config = f"{entry.id}/vae", entry.recipe.vae
    if not entry.recipe.has_vae:
        raise UnusableModel(f"{entry.id} has no VAE of its own; name one in `vae`", field="vae")
    with _translate_damage(name):
        if entry.is_ldm:
            found = _ldm_vae_tensors(entry.path, config, target)
        else:
            found = _vae_names(_plain(folder_tensors(entry.path / "vae", name), target))
        return _filled_vae(config, found, target, name)


def vae_config(entry: VaeEntry, own: Config) -> Config:
    """`own`: the config of the checkpoint's VAE, for a file that comes without one."""
    with _translate_damage(f"vae {entry.id}"):
        config = read_json(entry.path / "config.json") if entry.path.is_dir() else own
    # Which latents the UNet makes is the checkpoint's, as in Playground 2.5.
    return {**config, **{key: own[key] for key in _STATISTICS}} if all(own.get(key) for key in _STATISTICS) else config


def load_separate_vae(entry: VaeEntry, config: Config, target: LoadTarget) -> Any:
    with _translate_damage(f"vae {entry.id}"):
        if entry.is_tiny:
            return _tiny_vae(entry, config, target)
        if entry.path.is_dir():
            found = _vae_names(_plain(folder_tensors(entry.path, f"vae {entry.id}"), target))
        else:
            found = _vae_file_tensors(entry.path, config, target)
        return _filled_vae(config, found, target, f"vae {entry.id}")


def load_text(entry: CheckpointEntry, recipe: TextRecipe, target: LoadTarget) -> Any:
    name = f"{entry.id}/{recipe.part}"
    with _translate_damage(name):
        model = _empty(ClipText, recipe.config)
        if entry.is_ldm:
            found = _ldm_text_tensors(entry.path, recipe, model, target)
        else:
            found = text_tensors(_plain(folder_tensors(entry.path / recipe.part, name), target))
        return fill_module(model, found, target, name=name)


def load_controlnet(entry: ControlNetEntry, target: LoadTarget, base: Mapping[str, Tensor] | None = None) -> Any:
    """`base`: the UNet's tensors, such as (O, I), by name, for one whose own are a difference to them."""
    name = f"controlnet {entry.id}"
    with _translate_damage(name):
        if entry.path.is_dir():
            found = _plain(folder_tensors(entry.path, name), target)
        else:
            found = _control_file_tensors(entry.path, entry.config, target)
        if base is not None:
            found = _added(found, base)
        return fill_module(_empty(ControlNetModel, entry.config), found, target, name=name)


def _added(found: Tensors, base: Mapping[str, Tensor]) -> Tensors:
    """Tensors, such as (O, I), and the base's of the same names added, in float32.

    Of a UNet for inpainting, which takes more channels, those of the latents count: they come first.
    """
    added = dict(found)
    for name in found.keys() & base.keys():
        own, other = found[name].float(), base[name].detach().to("cpu", torch.float32)
        if other.shape != own.shape and other.dim() > 1:
            other = other[:, : own.shape[1]]
        added[name] = own + other
    return added


def fill_module(model: Any, found: Mapping[str, Tensor], target: LoadTarget, *, name: str = "") -> Any:
    """A shallow copy of the empty model with these tensors in it, which are not copied where they have the type.

    `found`: by parameter name, such as a layer's (O, I) or (O, I, K, K); ValueError where one is missing or of another
    shape. What no parameter takes is logged; with a `name`, which it is logged under, UnusableModel where that is much.
    Raises as `target.reserve` does before anything is copied.
    """
    left = _leftovers(name, model, found) if name else ""
    lacking = [name for name, _ in model.named_parameters() if name not in found]
    if lacking:
        raise ValueError(f"{len(lacking)} tensors are missing, such as {lacking[0]}")

    numbers = sum(parameter.numel() for parameter in model.parameters())
    target.reserve(numbers * target.dtype.itemsize)

    def put(name: str, empty: Tensor) -> Tensor:
        if not empty.is_floating_point():
            return _position_ids(name, empty)
        if found[name].shape != empty.shape:
            raise ValueError(f"{name} has another shape")
        return found[name].to(target.dtype)

    filled = shallow_copy_module(model, put)
    filled.leftovers = left
    return filled


def leftovers_of(modules: Iterable[Any]) -> tuple[str, ...]:
    """A sentence for each of these parts whose files have more than it takes."""
    return tuple(left for module in modules if (left := getattr(module, "leftovers", "")))


def _leftovers(name: str, model: Any, found: Mapping[str, Tensor]) -> str:
    """A sentence, or an empty string. `found`: by parameter name, of any shape."""
    taken = {each for each, _ in model.named_parameters()} | {each for each, _ in model.named_buffers()}
    left = [each for each in found if each not in taken and not is_harmless(model, each)]
    if not left:
        return ""
    log.warning("weights_left_over", model=name, tensors=len(left), such_as=min(left)[:CAUSE_LIMIT])
    if is_much(left, {each: tuple(tensor.shape) for each, tensor in found.items()}):
        raise UnusableModel(f"{name} has {no_place(left)}; it is another kind of model")
    return f"{name} has {no_place(left)}"


def is_harmless(model: Any, name: str) -> bool:
    """What files of text encoders have beside what is used of them."""
    return isinstance(model, ClipText) and is_harmless_in_text(name, model.config.num_hidden_layers)


def _position_ids(name: str, empty: Tensor) -> Tensor:
    """CLIP's position ids, 0 to L - 1, which newer files lack."""
    assert name.endswith("position_ids"), name
    return torch.arange(empty.shape[-1]).expand(empty.shape)


def _empty(kind: Any, config: Config) -> Any:
    """To be filled; cached by class and config, as building one costs more than filling it."""
    return _build(kind, json.dumps(config, sort_keys=True))


@lru_cache(maxsize=EMPTY_LIMIT)
def _build(kind: Any, config: str) -> Any:
    options = json.loads(config)
    with build_empty():
        made = kind.from_config(options)
    return made.eval()


def _filled_vae(config: Config, found: Mapping[str, Tensor], target: LoadTarget, name: str) -> Any:
    """Without an encoder where the files have none, as those that were fetched for text2img alone."""
    vae = shallow_copy_module(_empty(AutoencoderKL, config), lambda name, tensor: tensor)
    if not any(name.startswith("encoder.") for name in found):
        vae.encoder = vae.quant_conv = None
    return fill_module(vae, found, target, name=name)


def _tiny_vae(entry: VaeEntry, config: Config, target: LoadTarget) -> Any:
    if entry.path.is_dir():
        return fill_module(_empty(AutoencoderTiny, config), folder_tensors(entry.path, entry.id), target)
    return fill_module(_empty(AutoencoderTiny, {}), tiny_vae_file(entry.path), target)


@contextmanager
def _translate_damage(name: str) -> Iterator[None]:
    """Errors of files as ours. A cause may name paths, so it is only logged."""
    try:
        yield
    except BadHeader as error:
        raise _damaged(name, error) from error
    except FanlightError:
        raise
    except (*CONTENT_ERRORS, SafetensorError) as error:
        if is_of_device(error):
            raise
        raise _damaged(name, error) from error


def _damaged(name: str, cause: Exception) -> FanlightError:
    return damaged(name, cause, f"{name} cannot be loaded: a file is missing, damaged or of another model")


@contextmanager
def build_empty() -> Iterator[None]:
    """Inside, modules are built without memory and without initial values, as files are about to provide them."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Skips torch.nn.init, which does nothing on the meta device but imports torch._dynamo for it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def folder_tensors(folder: Path, name: str) -> Tensors:
    """Of one part's folder; fp16 only where there is nothing else. UnusableModel where there are only pickles."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [file for file in files if not _VARIANT.search(file.name)]
    if not files and (any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))):
        raise UnusableModel(f"{name} has pickles only, which are not loaded; give it as safetensors", field="model")
    if not files:
        raise MissingFile("no safetensors")
    chosen = whole or [file for file in files if ".fp16" in file.name] or files
    return {key: tensor for file in chosen for key, tensor in load_safetensors(file).items()}


def _plain(found: Mapping[str, Tensor], target: LoadTarget) -> Tensors:
    """By name, of any shape: as weights, where a file has them in eight bits with scales."""
    return dequantized(found, target.dtype, target.reserve)


def _ldm_unet_tensors(path: Path, config: Config, target: LoadTarget) -> Tensors:
    found = _plain(load_checkpoint(path, prefixes=("model.diffusion_model.",)), target)
    return _converted(_conversions().convert_ldm_unet_checkpoint, found, config)


def _ldm_vae_tensors(path: Path, config: Config, target: LoadTarget) -> Tensors:
    found = _plain(load_checkpoint(path, prefixes=(_FIRST_STAGE,)), target)
    return _converted(_conversions().convert_ldm_vae_checkpoint, found, config)


def _ldm_text_tensors(path: Path, recipe: TextRecipe, model: Any, target: LoadTarget) -> Tensors:
    """`model`: the empty text encoder, whose layers' width the conversion needs."""
    found = _plain(load_checkpoint(path, prefixes=("cond_stage_model.", "conditioner.embedders.")), target)
    for prefix, is_open_clip in TEXT_PREFIXES[recipe.part]:
        if any(name.startswith(prefix) for name in found):
            own = {name: tensor for name, tensor in found.items() if name.startswith(prefix)}
            if is_open_clip:
                return text_tensors(_conversions().convert_open_clip_checkpoint(model, own, prefix=prefix))
            return text_tensors({name.removeprefix(prefix): tensor for name, tensor in own.items()})
    raise MissingFile("no text encoder")


def _control_file_tensors(path: Path, config: Config, target: LoadTarget) -> Tensors:
    # In some files the base model's tensors are beside its own.
    found = _plain(load_safetensors(path, prefixes=(CONTROL,)) or load_safetensors(path), target)
    if any(name.startswith("controlnet_cond_embedding.") for name in found):
        return found
    return _converted(_conversions().convert_controlnet_checkpoint, found, config)


def _vae_file_tensors(path: Path, config: Config, target: LoadTarget) -> Tensors:
    """A separate VAE's file, in diffusers' names or the LDM layout's."""
    found = _plain(load_safetensors(path), target)
    if any(".mid_block." in name for name in found):
        return _vae_names(found)
    return _converted(_conversions().convert_ldm_vae_checkpoint, found, config)


def tiny_vae_file(path: Path) -> Tensors:
    return load_safetensors(path)


def _vae_names(found: Mapping[str, Tensor]) -> Tensors:
    """Tensors of any shape, with the names of diffusers' present classes."""
    return {_attention_name(name): tensor for name, tensor in found.items()}


def text_tensors(found: Mapping[str, Tensor]) -> Tensors:
    """Tensors, such as layers' (O, I), without the prefix `text_model.`, which some files have before the names."""
    return {name.removeprefix("text_model."): tensor for name, tensor in found.items()}


def _attention_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    for old, new in _OLD_ATTENTION.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _conversions() -> Any:
    """diffusers' conversions from the LDM layout's names."""
    return import_diffusers_module("loaders.single_file_utils")


def _converted(convert: Any, found: Tensors, config: Config) -> Tensors:
    """diffusers' conversion, which removes from its argument what it converts."""
    if not found:
        raise MissingFile("nothing of this part is in the file")
    converted: Mapping[str, Tensor] = convert(dict(found), dict(config))
    return {name: tensor for name, tensor in converted.items() if isinstance(tensor, torch.Tensor)}
