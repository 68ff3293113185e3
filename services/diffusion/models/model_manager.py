"""Models in memory: loaded when first needed, pinned while in use, evicted when memory is short. Starts without torch.

For the device thread; what is cached may be read from any thread. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from fanlight.errors import NodeFault
from services.diffusion.models.entries import weight_bytes
from services.diffusion.models.faults import part_of_device
from services.diffusion.models.precision import AUTO, FLOAT16, FLOAT32, precision_of_card
from services.diffusion.models.tiers import Pin, Residency
from services.kernel import process

if TYPE_CHECKING:
    import torch

    from services.diffusion.models.device import TorchDevice
    from services.diffusion.models.entries import (
        CheckpointEntry,
        ControlNetEntry,
        EmbeddingEntry,
        Entry,
        LoraUse,
        VaeEntry,
    )
    from services.diffusion.models.model_cache import Checkpoint, ModelCache


class ModelManager:
    """Imports torch and diffusers when the first model is loaded, so that a process starts without them."""

    def __init__(
        self,
        *,
        device: str = "auto",
        precision: str = AUTO,
        ram_bytes: int = 0,
        vram_bytes: int = 0,
        tiny_vae_of: Callable[[CheckpointEntry], VaeEntry | None] = lambda entry: None,
        open_device: Callable[[str], TorchDevice] | None = None,
    ) -> None:
        """`device`: `auto`, `cpu`, `cuda` or `cuda:N`. `precision`: what models compute in, such as `float16`;
        `auto` chooses by the card. Bytes that models may fill; 0 chooses by the machine.

        `tiny_vae_of`: the TAESD that previews of a checkpoint are made with.
        """
        self._device_name = device
        self._precision = precision
        self._ram_bytes, self._vram_bytes = ram_bytes, vram_bytes
        self._tiny_vae_of = tiny_vae_of
        self._open_device = open_device
        self._opened: ModelCache | None = None

    @property
    def device_name(self) -> str:
        """Such as `cpu` or `cuda:NVIDIA GeForce RTX 3060`; empty until the first model is loaded."""
        return self._opened.device.name if self._opened else ""

    @property
    def vram_bytes(self) -> int:
        """What models may fill of the device's own memory; 0 where it has none, or is not open yet."""
        opened = self._opened
        return 0 if opened is None or opened.device.is_host else self._vram_bytes or opened.device.memory_bytes()

    @property
    def number_bytes(self) -> int:
        """Bytes of one number on the device; opens it."""
        return self._cache().device.dtype.itemsize

    @property
    def precision(self) -> str:
        """What UNets compute in, such as `float16`; until the device is open, what is expected."""
        if self._opened is not None:
            return str(self._opened.device.dtype).removeprefix("torch.")
        return self._expected_precision

    @cached_property
    def _expected_precision(self) -> str:
        """Known without importing torch."""
        if self._precision != AUTO:
            return self._precision
        if self._device_name == "cpu" or (self._device_name == "auto" and not process.count_gpus()):
            return FLOAT32
        card = process.card_of(int(self._device_name.partition(":")[2] or "0"))
        return precision_of_card(*card) if card else FLOAT16

    @property
    def is_on_gpu(self) -> bool:
        return self._opened is not None and not self._opened.device.is_host

    @property
    def cached(self) -> frozenset[Entry]:
        """The entries of the models in memory."""
        return frozenset(self._opened.residencies()) if self._opened else frozenset()

    @property
    def used_bytes(self) -> int:
        """What models fill, in RAM and on a GPU together."""
        return self._opened.used_bytes if self._opened else 0

    def residency(self, entry: Entry) -> Residency:
        """On a machine whose device is the CPU, what is cached is in RAM."""
        level = self._opened.residencies().get(entry) if self._opened else None
        if level is not None:
            return level
        return Residency.REMOTE if entry.reference and not _is_whole(entry) else Residency.DISK

    def checkpoint(
        self,
        entry: CheckpointEntry,
        controlnets: Sequence[ControlNetEntry] = (),
        *,
        loras: Sequence[LoraUse] = (),
        vae: VaeEntry | None = None,
        embeddings: Sequence[EmbeddingEntry] = (),
        has_previews: bool = False,
        work_bytes: int = 0,
        in_float32: bool = False,
    ) -> Checkpoint:
        """The checkpoint and what is added to it, pinned in memory until the last reference to it is gone.

        `in_float32`: whatever the device computes in. `work_bytes`: what an image needs beside the models. Raises as
        the loaders do, or ResourceExhausted; the next call tries again.
        """
        return self._cache().checkpoint(
            entry,
            controlnets=controlnets,
            loras=loras,
            vae=vae,
            embeddings=embeddings,
            tiny_vae=self._tiny_vae_of(entry) if has_previews else None,
            work_bytes=work_bytes,
            in_float32=in_float32,
        )

    def with_vae_in_float32(self, checkpoint: Checkpoint, vae: VaeEntry | None) -> Checkpoint:
        """`vae`: the one that was asked for, if any. Raises as `checkpoint`."""
        return self._cache().with_vae_in_float32(checkpoint, vae)

    @contextmanager
    def pinned(self, name: str, load: Callable[[torch.dtype], Any]) -> Iterator[Any]:
        """A model that belongs to no entry, such as a safety checker: on the device while the context is open.

        In RAM where the device has no memory for it.
        """
        pin = Pin()
        yield self._cache().other(name, load, pin)
        # The pin ends here, and not before.
        del pin

    def release(self) -> None:
        """Evict from the device all that is not pinned."""
        if self._opened is not None:
            self._opened.release()

    def _cache(self) -> ModelCache:
        """With the device, chosen once."""
        if self._opened is None:
            from services.diffusion.models.device import open_device
            from services.diffusion.models.model_cache import ModelCache

            try:
                opener = self._open_device or partial(open_device, precision=self._precision)
                device = opener(self._device_name)
            except NodeFault as error:
                error.of_part(part_of_device(self._device_name))
                raise
            self._opened = ModelCache(device, ram_bytes=self._ram_bytes, vram_bytes=self._vram_bytes)
        return self._opened


def _is_whole(entry: Entry) -> bool:
    """The weight store may have evicted files of what was fetched since; the folder stays."""
    try:
        size_bytes = weight_bytes(entry.path) if entry.path.is_dir() else entry.path.stat().st_size
    except OSError:
        return False
    return size_bytes >= entry.size_bytes
