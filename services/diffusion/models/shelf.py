"""Where the parts of models lie: on the device, in RAM, or still on disk. Every part is loaded once and shared by all.

A part comes to the device from RAM, and to RAM from disk. Where the device is the CPU, the two are one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fanlight.errors import FailedPrecondition, NodeFault, ResourceExhausted
from services.diffusion.generation import LoraUse
from services.diffusion.models.device import Device
from services.diffusion.models.device import ram_bytes as machine_bytes
from services.diffusion.models.embeddings import check_widths, read_embedding, with_rows
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, EmbeddingEntry, Entry, VaeEntry
from services.diffusion.models.library import Residency
from services.diffusion.models.loading import (
    Checkpoint,
    Room,
    TextPart,
    load_controlnet,
    load_separate_vae,
    load_text,
    load_unet,
    load_vae,
    vae_config,
)
from services.diffusion.models.loras import Lora, read_lora
from services.diffusion.models.marks import mark
from services.diffusion.models.patching import Dose, patched
from services.diffusion.models.recipes import Config, TextRecipe
from services.diffusion.models.residency import Lease, Tier
from services.diffusion.models.shadow import size_bytes
from services.diffusion.models.tokenizers import digest_of, load_tokenizer
from services.diffusion.schedulers.make import base_config
from services.kernel.logs import get_logger

log = get_logger()

# Vectors of textual inversions and tokenizers are small; so many of each are kept.
SMALL_THINGS_LIMIT = 512

# (what it is, the entry, what marks this very state of its files, and what was done to it)
Key = tuple[object, ...]


class Shelf:
    def __init__(self, device: Device, *, ram_bytes: int, vram_bytes: int) -> None:
        self.device = device
        self._ram = Tier("RAM", limit_bytes=ram_bytes or machine_bytes(), on_evicted=_log_eviction)
        if device.is_host:
            self._vram = self._ram
        else:
            limit = vram_bytes or device.memory_bytes()
            self._vram = Tier("VRAM", limit_bytes=limit, on_evicted=self._freed)
        self._small: dict[Key, Any] = {}

    def held(self) -> Mapping[Entry, Residency]:
        """By entry, the nearest that a part of it is."""
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

    def other(self, name: str, load: Callable[[torch.dtype], Any], lease: Lease) -> Any:
        """A model that belongs to no entry; `load` is told as what numbers. In RAM where the device has no room."""
        key = (name, None)
        try:
            return self._part(key, lambda: load(self.device.dtype), lease)
        except ResourceExhausted:
            kept = self._ram.get(key, lease)
            if kept is None:
                raise
            return kept

    def release(self) -> None:
        """Off the device with what no picture uses. What is in RAM stays there."""
        self._vram.release()
        self.device.freed()

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
    ) -> Checkpoint:
        """`work_bytes`: what painting needs beside the models. ResourceExhausted where the two do not fit."""
        lease = Lease(work_bytes)
        self._vram.admit(lease)
        unet = self._unet(entry, loras, lease)
        texts = tuple(self._text(entry, recipe, loras, lease) for recipe in entry.recipe.texts)
        return Checkpoint(
            entry=entry,
            texts=self._with_embeddings(entry, texts, embeddings) if embeddings else texts,
            unet=unet,
            vae=self._own_vae(entry, lease) if vae is None else self._separate_vae(vae, entry, lease),
            nets=tuple(self._controlnet(each, lease) for each in controlnets),
            tiny_vae=self._tiny_vae(tiny_vae, entry, lease) if tiny_vae else None,
            weights=self._keep(("weights", entry), lambda: sum(each.numel() for each in unet.parameters())),
            scheduler_config=self._keep(("scheduler", entry), lambda: _scheduler_config(entry)),
            lease=lease,
        )

    def _unet(self, entry: CheckpointEntry, loras: Sequence[LoraUse], lease: Lease) -> Any:
        key = ("unet", entry, mark(entry.path, "unet"))
        uses = [(use, use.unet_weight) for use in loras if use.unet_weight]
        return self._patched(key, lambda: load_unet(entry, self._room()), uses, "unet", lease)

    def _text(self, entry: CheckpointEntry, recipe: TextRecipe, loras: Sequence[LoraUse], lease: Lease) -> TextPart:
        key = (recipe.part, entry, mark(entry.path, recipe.part))
        uses = [(use, use.text_weight) for use in loras if use.text_weight]
        tokenizer = self._keep(("tokenizer", entry, recipe.tokenizer), lambda: self._tokenizer(entry, recipe))
        encoder = self._patched(
            key,
            lambda: _knowing_its_end(load_text(entry, recipe, self._room()), tokenizer),
            uses,
            recipe.part,
            lease,
        )
        return TextPart(
            tokenizer=tokenizer,
            encoder=encoder,
            is_penultimate=entry.recipe.looks_at_sizes,
            is_pooled=entry.recipe.looks_at_sizes and recipe is entry.recipe.texts[-1],
        )

    def _tokenizer(self, entry: CheckpointEntry, recipe: TextRecipe) -> Any:
        """One for all checkpoints with the same files."""
        return self._keep(("tokenizer", digest_of(entry, recipe)), lambda: load_tokenizer(entry, recipe))

    def _own_vae(self, entry: CheckpointEntry, lease: Lease) -> Any:
        dtype = self._vae_dtype(entry.recipe.vae)
        return self._part(("vae", entry, mark(entry.path, "vae")), lambda: load_vae(entry, self._room(dtype)), lease)

    def _separate_vae(self, vae: VaeEntry, entry: CheckpointEntry, lease: Lease) -> Any:
        config = vae_config(vae, entry.recipe.vae)
        dtype = self._vae_dtype(config, entry.recipe.vae)
        key = ("vae", vae, mark(vae.path, ""), config.get("scaling_factor"), dtype)
        return self._part(key, lambda: load_separate_vae(vae, config, self._room(dtype)), lease)

    def _tiny_vae(self, vae: VaeEntry, entry: CheckpointEntry, lease: Lease) -> Any:
        """None where it is damaged or finds no room: no picture fails for its previews."""
        try:
            return self._separate_vae(vae, entry, lease)
        except (FailedPrecondition, NodeFault, ResourceExhausted):
            return None

    def _vae_dtype(self, *configs: Config) -> torch.dtype:
        """SDXL's own overflows in half precision, and its config says so; the first counts that says anything."""
        told = next((config["force_upcast"] for config in configs if "force_upcast" in config), False)
        return torch.float32 if told else self.device.dtype

    def _controlnet(self, entry: ControlNetEntry, lease: Lease) -> Any:
        key = ("controlnet", entry, mark(entry.path, ""))
        return self._part(key, lambda: load_controlnet(entry, self._room()), lease)

    def _room(self, dtype: torch.dtype | None = None) -> Room:
        return Room(
            dtype=dtype or self.device.dtype, reserve=lambda size_bytes: self._ram.make_room(size_bytes, what="a model")
        )

    def _patched(
        self, key: Key, load: Callable[[], Any], uses: Sequence[tuple[LoraUse, float]], part: str, lease: Lease
    ) -> Any:
        """The part with these LoRAs in it, in whatever order; itself where none of them has layers for it."""
        ordered = sorted(uses, key=lambda pair: (pair[0].entry.id, pair[1]))
        doses = [Dose(lora=self._lora(use), strength=strength) for use, strength in ordered]
        doses = [dose for dose in doses if dose.lora.layers.get(part)]
        if not doses:
            return self._part(key, load, lease)
        combination = (*key, *((dose.lora.entry, mark(dose.lora.entry.path, ""), dose.strength) for dose in doses))
        ready = self._vram.get(combination, lease)
        # Looked at after the patched one, so that of the two it is the later to go.
        pristine = self._part(key, load, lease)
        if ready is None:
            made = patched(pristine, part, doses, str(getattr(key[1], "id", "")))
            ready = made.module
            self._vram.put(combination, ready, made.size_bytes, lease)
        return ready

    def _part(self, key: Key, load: Callable[[], Any], lease: Lease) -> Any:
        """From the nearest place where it is, and to the device."""
        ready = self._vram.get(key, lease)
        if ready is not None:
            return ready
        kept = None if self.device.is_host else self._ram.get(key, lease)
        if kept is None:
            loaded = load()
            self._ram.put(key, kept := self.device.kept(loaded), size_bytes(loaded), lease)
            log.info("model_loaded", kind=key[0], id=getattr(key[1], "id", ""), bytes=size_bytes(loaded))
        if self.device.is_host:
            return kept
        self._vram.make_room(size_bytes(kept), what=str(key[0]))
        self._vram.put(key, uploaded := self.device.uploaded(kept), size_bytes(kept), lease)
        return uploaded

    def _with_embeddings(
        self, entry: CheckpointEntry, texts: Sequence[TextPart], embeddings: Sequence[EmbeddingEntry]
    ) -> tuple[TextPart, ...]:
        """FailedPrecondition for one of another width."""
        widths = [text.encoder.config.hidden_size for text in texts]
        read = {}
        for each in embeddings:
            key = ("embedding", each, mark(each.path, ""))
            read[each.id] = self._keep(key, partial(read_embedding, each))
            check_widths(each, read[each.id], widths, entry.id)
        return tuple(
            with_rows(text, {name: vectors[number] for name, vectors in read.items()})
            for number, text in enumerate(texts)
        )

    def _lora(self, use: LoraUse) -> Lora:
        lora: Lora = self._keep(("lora", use.entry, mark(use.entry.path, "")), lambda: read_lora(use.entry))
        return lora

    def _keep(self, key: Key, make: Callable[[], Any]) -> Any:
        """Of small things the latest; a LoRA is a mapping of its file, which takes no memory of its own."""
        if key in self._small:
            self._small[key] = self._small.pop(key)
        else:
            self._small[key] = make()
            while len(self._small) > SMALL_THINGS_LIMIT:
                del self._small[next(iter(self._small))]
        return self._small[key]

    def _freed(self, key: object) -> None:
        _log_eviction(key)
        self.device.freed()


def _knowing_its_end(encoder: Any, tokenizer: Any) -> Any:
    """Old configs have a number there that means "the highest id", which a token that was added would be."""
    encoder.eos_token_id = tokenizer.eos_token_id
    return encoder


def _scheduler_config(entry: CheckpointEntry) -> Mapping[str, Any]:
    try:
        return base_config(entry.recipe.scheduler)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise NodeFault(f"{entry.id}/scheduler cannot be loaded: its config is damaged") from error


def _log_eviction(key: object) -> None:
    assert isinstance(key, tuple)
    log.info("model_dropped", kind=key[0], id=getattr(key[1], "id", ""))
