"""The cache of models' parts: on the device, in RAM, or still on disk. Each part is loaded once and shared by all.

A part comes to the device from RAM, and to RAM from disk. On a CPU the two are one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fanlight.errors import FailedPrecondition, NodeFault, ResourceExhausted
from services.diffusion.models.device import TorchDevice, module_bytes
from services.diffusion.models.device import ram_bytes as machine_bytes
from services.diffusion.models.embeddings import check_length, check_widths, read_embedding, with_rows
from services.diffusion.models.entries import (
    CheckpointEntry,
    ControlNetEntry,
    EmbeddingEntry,
    Entry,
    LoraUse,
    VaeEntry,
    fingerprint,
)
from services.diffusion.models.faults import CONTENT_ERRORS, UnusableModel, blames
from services.diffusion.models.loading import (
    LoadTarget,
    load_controlnet,
    load_separate_vae,
    load_text,
    load_unet,
    load_vae,
    vae_config,
)
from services.diffusion.models.lora_bundles import read_bundled
from services.diffusion.models.lora_files import LoraWeights, read_lora
from services.diffusion.models.lora_fit import LoraFit
from services.diffusion.models.patching import LoraStrength, PatchedModule, patch_loras
from services.diffusion.models.recipes import Config, TextRecipe
from services.diffusion.models.tiers import Pin, Residency, Tier
from services.diffusion.models.tokenizer import digest_of, load_tokenizer
from services.diffusion.prompt import TextPart
from services.diffusion.schedulers import base_config
from services.kernel.logs import get_logger


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Checkpoint:
    """A checkpoint in memory with what one image adds to it. Never changed; what it has is pinned while it lives."""

    entry: CheckpointEntry
    # One, or two for SDXL base.
    texts: tuple[TextPart, ...]
    unet: Any
    vae: Any
    # The image's ControlNets, in order.
    nets: tuple[Any, ...] = ()
    # A TAESD for previews, where there is one.
    tiny_vae: Any = None
    # How many parameters the UNet has.
    weights: int
    # With the defaults of the class that the checkpoint was saved with.
    scheduler_config: Mapping[str, Any]
    # Keeps all of this in memory, with those of what it was made from.
    pin: Pin
    pins: tuple[Pin, ...] = ()
    # What it does otherwise than the request may have meant, such as a LoRA's layers that it lacks; sentences.
    warnings: tuple[str, ...] = ()
    # The UNet's, which it would have to look for among its parameters each time.
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)

    @property
    def can_encode(self) -> bool:
        """Whether its VAE has an encoder; one that was fetched for text2img alone has none."""
        return self.vae.encoder is not None

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.unet.device)
        object.__setattr__(self, "dtype", next(self.unet.parameters()).dtype)


log = get_logger()

# Vectors of textual inversions and tokenizers are small; so many of each are in_ram.
SMALL_THINGS_LIMIT = 512
# (what it is, the entry, its files' fingerprint, and what was done to it)
Key = tuple[object, ...]


class ModelCache:
    """Each method pins what it returns with `pin`. For the device thread; `residencies` may be called from any."""

    def __init__(self, device: TorchDevice, *, ram_bytes: int, vram_bytes: int) -> None:
        self.device = device
        self._ram = Tier("RAM", limit_bytes=ram_bytes or machine_bytes(), on_evicted=_log_eviction)
        if device.is_host:
            self._vram = self._ram
        else:
            limit = vram_bytes or device.memory_bytes()
            self._vram = Tier("VRAM", limit_bytes=limit, on_evicted=self._on_evicted_from_device)
        self._small: dict[Key, Any] = {}

    def residencies(self) -> Mapping[Entry, Residency]:
        """By entry, the residency of its part that is nearest to the device."""
        levels: dict[Entry, Residency] = {}
        near = Residency.RAM if self.device.is_host else Residency.VRAM
        for tier, level in ((self._ram, Residency.RAM), (self._vram, near)):
            for key in tier.keys:
                assert isinstance(key, tuple)
                if key[1] is None:
                    continue
                levels[key[1]] = max(level, levels.get(key[1], Residency.RAM))
        return levels

    @property
    def used_bytes(self) -> int:
        return sum(tier.used_bytes for tier in {id(tier): tier for tier in (self._ram, self._vram)}.values())

    def other(self, name: str, load: Callable[[torch.dtype], Any], pin: Pin) -> Any:
        """A model that belongs to no entry. In RAM where the device has no memory for it."""
        key = (name, None)
        try:
            return self._part(key, lambda: load(self.device.dtype), pin)
        except ResourceExhausted:
            in_ram = self._ram.get(key, pin)
            if in_ram is None:
                raise
            return in_ram

    def release(self) -> None:
        """Evict from the device what no image uses. What is in RAM stays there."""
        self._vram.release()
        self.device.after_eviction()

    def checkpoint(
        self,
        entry: CheckpointEntry,
        *,
        controlnets: Sequence[ControlNetEntry] = (),
        loras: Sequence[LoraUse] = (),
        vae: VaeEntry | None = None,
        embeddings: Sequence[EmbeddingEntry] = (),
        tiny_vae: VaeEntry | None = None,
        work_bytes: int = 0,
        in_float32: bool = False,
    ) -> Checkpoint:
        """`work_bytes`: what an image needs beside the models. ResourceExhausted where the two do not fit.

        `in_float32`: all of it, whatever the device computes in.
        """
        pin = Pin(work_bytes, torch.float32 if in_float32 else None)
        self._vram.admit(pin)
        with blames(entry):
            fit = LoraFit(entry.id)
            unet = self._unet(entry, loras, pin, fit)
            texts = tuple(self._text(entry, recipe, loras, pin, fit) for recipe in entry.recipe.texts)
            parts = ("unet", *(recipe.part for recipe in entry.recipe.texts))
            return Checkpoint(
                entry=entry,
                texts=self._with_embeddings(entry, texts, embeddings) if embeddings else texts,
                unet=unet,
                vae=self._own_vae(entry, pin) if vae is None else self._separate_vae(vae, entry, pin),
                nets=tuple(self._controlnet(each, entry, pin) for each in controlnets),
                tiny_vae=self._tiny_vae(tiny_vae, entry, pin) if tiny_vae else None,
                weights=self._cached(("weights", entry), lambda: sum(each.numel() for each in unet.parameters())),
                scheduler_config=self._cached(("scheduler", entry), lambda: _scheduler_config(entry)),
                pin=pin,
                warnings=fit.warnings([(use, self._lora(use)) for use in loras], parts),
            )

    def with_vae_in_float32(self, checkpoint: Checkpoint, vae: VaeEntry | None) -> Checkpoint:
        """`vae`: the one that was asked for, if any. ResourceExhausted where it does not fit."""
        pin = Pin(dtype=torch.float32)
        entry = checkpoint.entry
        own = self._own_vae(entry, pin) if vae is None else self._separate_vae(vae, entry, pin)
        return replace(checkpoint, vae=own, pins=(*checkpoint.pins, checkpoint.pin), pin=pin)

    def _unet(self, entry: CheckpointEntry, loras: Sequence[LoraUse], pin: Pin, fit: LoraFit) -> Any:
        key = ("unet", entry, fingerprint(entry.path, "unet"), *_typed(pin))
        uses = [(use, use.unet_weight) for use in loras if use.unet_weight]
        return self._patched(key, lambda: load_unet(entry, self._target(pin.dtype)), uses, "unet", pin, fit)

    def _text(
        self, entry: CheckpointEntry, recipe: TextRecipe, loras: Sequence[LoraUse], pin: Pin, fit: LoraFit
    ) -> TextPart:
        key = (recipe.part, entry, fingerprint(entry.path, recipe.part), *_typed(pin))
        uses = [(use, use.text_weight) for use in loras if use.text_weight]
        tokenizer = self._cached(("tokenizer", entry, recipe.tokenizer), lambda: self._tokenizer(entry, recipe))
        encoder = self._patched(
            key,
            lambda: _with_end_token(load_text(entry, recipe, self._target(pin.dtype)), tokenizer),
            uses,
            recipe.part,
            pin,
            fit,
        )
        return TextPart(
            tokenizer=tokenizer,
            encoder=encoder,
            is_penultimate=entry.recipe.is_sdxl,
            is_pooled=entry.recipe.is_sdxl and recipe is entry.recipe.texts[-1],
        )

    def _tokenizer(self, entry: CheckpointEntry, recipe: TextRecipe) -> Any:
        """One for all checkpoints with the same files."""
        return self._cached(("tokenizer", digest_of(entry, recipe)), lambda: load_tokenizer(entry, recipe))

    def _own_vae(self, entry: CheckpointEntry, pin: Pin) -> Any:
        dtype = pin.dtype or self._vae_dtype(entry.recipe.vae)
        key = ("vae", entry, fingerprint(entry.path, "vae"), *_typed(pin))
        return self._part(key, lambda: load_vae(entry, self._target(dtype)), pin)

    def _separate_vae(self, vae: VaeEntry, entry: CheckpointEntry, pin: Pin) -> Any:
        with blames(vae):
            config = vae_config(vae, entry.recipe.vae)
            dtype = pin.dtype or self._vae_dtype(config, entry.recipe.vae)
            key = ("vae", vae, fingerprint(vae.path, ""), config.get("scaling_factor"), dtype)
            return self._part(key, lambda: load_separate_vae(vae, config, self._target(dtype)), pin)

    def _tiny_vae(self, vae: VaeEntry, entry: CheckpointEntry, pin: Pin) -> Any:
        """None where it is damaged or does not fit: no image fails for its previews."""
        try:
            return self._separate_vae(vae, entry, pin)
        except (FailedPrecondition, NodeFault, ResourceExhausted):
            return None

    def _vae_dtype(self, *configs: Config) -> torch.dtype:
        """SDXL's own overflows in half precision; the first config with a `force_upcast` decides."""
        is_upcast = next((config["force_upcast"] for config in configs if "force_upcast" in config), False)
        return torch.float32 if is_upcast else self.device.dtype

    def _controlnet(self, entry: ControlNetEntry, checkpoint: CheckpointEntry, pin: Pin) -> Any:
        key: Key = ("controlnet", entry, fingerprint(entry.path, ""), *_typed(pin))
        target = self._target(pin.dtype)
        with blames(entry):
            if not entry.is_difference:
                return self._part(key, lambda: load_controlnet(entry, target), pin)
            # One for each checkpoint: its tensors are that one's with a difference.
            key = (*key, checkpoint, fingerprint(checkpoint.path, "unet"))
            unet = self._unet(checkpoint, (), pin, LoraFit(checkpoint.id))
            return self._part(key, lambda: load_controlnet(entry, target, unet.state_dict()), pin)

    def _target(self, dtype: torch.dtype | None = None) -> LoadTarget:
        return LoadTarget(
            dtype=dtype or self.device.dtype,
            reserve=lambda size_bytes: self._ram.make_room(size_bytes, what="a model"),
        )

    def _patched(
        self,
        key: Key,
        load: Callable[[], Any],
        uses: Sequence[tuple[LoraUse, float]],
        part: str,
        pin: Pin,
        fit: LoraFit,
    ) -> Any:
        """The part with these LoRAs in it, in whatever order; unpatched where none of them has layers for it."""
        ordered = sorted(uses, key=lambda pair: (pair[0].entry.id, pair[1]))
        strengths = [LoraStrength(lora=self._lora(use), strength=strength) for use, strength in ordered]
        strengths = [each for each in strengths if each.lora.layers.get(part)]
        if not strengths:
            return self._part(key, load, pin)
        combination = (
            *key,
            *((each.lora.entry, fingerprint(each.lora.entry.path, ""), each.strength) for each in strengths),
        )
        ready: PatchedModule | None = self._vram.get(combination, pin)
        # Used after the patched one, so that of the two it is evicted later.
        pristine = self._part(key, load, pin)
        if ready is None:
            ready = patch_loras(pristine, part, strengths)
            self._vram.put(combination, ready, ready.size_bytes, pin)
        fit.add(ready.left_out)
        return ready.module

    def _part(self, key: Key, load: Callable[[], Any], pin: Pin) -> Any:
        """From the nearest tier that has it, to the device."""
        ready = self._vram.get(key, pin)
        if ready is not None:
            return ready
        in_ram = None if self.device.is_host else self._ram.get(key, pin)
        if in_ram is None:
            loaded = load()
            self._ram.put(key, in_ram := self.device.pin_in_ram(loaded), module_bytes(loaded), pin)
            log.info("model_loaded", kind=key[0], id=getattr(key[1], "id", ""), size_bytes=module_bytes(loaded))
        if self.device.is_host:
            return in_ram
        self._vram.make_room(module_bytes(in_ram), what=str(key[0]))
        self._vram.put(key, uploaded := self.device.upload(in_ram), module_bytes(in_ram), pin)
        return uploaded

    def _with_embeddings(
        self, entry: CheckpointEntry, texts: Sequence[TextPart], embeddings: Sequence[EmbeddingEntry]
    ) -> tuple[TextPart, ...]:
        """UnusableModel for one of another width."""
        widths = [text.encoder.config.hidden_size for text in texts]
        read = {}
        for each in embeddings:
            key = ("embedding", each, fingerprint(each.path, ""))
            with blames(each):
                read[each.id] = self._cached(key, partial(read_bundled if each.bundled_in else read_embedding, each))
                check_widths(each, read[each.id], widths, entry.id)
                check_length(each, read[each.id], texts)
        return tuple(
            with_rows(text, {name: vectors[number] for name, vectors in read.items()})
            for number, text in enumerate(texts)
        )

    def _lora(self, use: LoraUse) -> LoraWeights:
        with blames(use.entry):
            lora: LoraWeights = self._cached(
                ("lora", use.entry, fingerprint(use.entry.path, "")), lambda: read_lora(use.entry)
            )
        return lora

    def _cached(self, key: Key, make: Callable[[], Any]) -> Any:
        """LRU cache of small things; a LoRA is a mapping of its file, which takes no memory of its own."""
        if key in self._small:
            self._small[key] = self._small.pop(key)
        else:
            self._small[key] = make()
            while len(self._small) > SMALL_THINGS_LIMIT:
                del self._small[next(iter(self._small))]
        return self._small[key]

    def _on_evicted_from_device(self, key: object) -> None:
        _log_eviction(key)
        self.device.after_eviction()


def _typed(pin: Pin) -> tuple[object, ...]:
    """What a part's key has beside the rest where it is not in the device's number type."""
    return () if pin.dtype is None else (str(pin.dtype),)


def _with_end_token(encoder: Any, tokenizer: Any) -> Any:
    """Old configs have a number there that means "the highest id", which an added token would be."""
    encoder.eos_token_id = tokenizer.eos_token_id
    return encoder


def _scheduler_config(entry: CheckpointEntry) -> Mapping[str, Any]:
    try:
        return base_config(entry.recipe.scheduler)
    except CONTENT_ERRORS as error:
        raise UnusableModel(f"{entry.id}/scheduler cannot be loaded: its config is damaged") from error


def _log_eviction(key: object) -> None:
    assert isinstance(key, tuple)
    log.info("model_evicted", kind=key[0], id=getattr(key[1], "id", ""))
