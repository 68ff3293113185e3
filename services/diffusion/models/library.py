"""Models in memory: what a picture needs is brought there, kept while it is used, and dropped when room is needed.

For the device thread; what is held may be asked from any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from services.diffusion.models.folders import weight_bytes
from services.diffusion.models.residency import Lease
from services.kernel import gpus

if TYPE_CHECKING:
    import torch

    from services.diffusion.generation import Generation
    from services.diffusion.models.device import Device
    from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, Entry, VaeEntry
    from services.diffusion.models.loading import Checkpoint
    from services.diffusion.models.shelf import Shelf


# As models/device.py has them; a test holds the two together.
PRECISION_OF_CPU, PRECISION_OF_GPU = "float32", "float16"


class Residency(IntEnum):
    """How near the device a model is."""

    REMOTE = 0
    DISK = 1
    RAM = 2
    VRAM = 3


def _is_whole(entry: Entry) -> bool:
    """Files of what was fetched may have made room for others since; its folder stays."""
    try:
        size_bytes = weight_bytes(entry.path) if entry.path.is_dir() else entry.path.stat().st_size
    except OSError:
        return False
    return size_bytes >= entry.size_bytes


class Library:
    """Imports torch and diffusers when the first model is asked for, so that a process starts without them."""

    def __init__(
        self,
        *,
        device: str = "auto",
        ram_bytes: int = 0,
        vram_bytes: int = 0,
        tiny_vae_of: Callable[[CheckpointEntry], VaeEntry | None] = lambda entry: None,
        open_device: Callable[[str], Device] | None = None,
    ) -> None:
        """`device`: `auto`, `cpu`, `cuda` or `cuda:N`. Bytes that models may fill; 0 chooses by what is there.

        `tiny_vae_of`: the TAESD that previews of a checkpoint are made with.
        """
        self._wanted = device
        self._ram_bytes, self._vram_bytes = ram_bytes, vram_bytes
        self._tiny_vae_of = tiny_vae_of
        self._open_device = open_device
        self._opened: Shelf | None = None

    @property
    def device_name(self) -> str:
        """Such as `cpu` or `cuda:NVIDIA GeForce RTX 3060`; empty until the first model is asked for."""
        return self._opened.device.name if self._opened else ""

    @property
    def vram_bytes(self) -> int:
        """What models may fill of the device's own memory; 0 where it has none, or is not open yet."""
        opened = self._opened
        return 0 if opened is None or opened.device.is_host else self._vram_bytes or opened.device.memory_bytes()

    @property
    def precision(self) -> str:
        """What UNets compute in, such as `float16`; until the device is open, what it will be by all that is known."""
        if self._opened is not None:
            return str(self._opened.device.dtype).removeprefix("torch.")
        return self._expected_precision

    @cached_property
    def _expected_precision(self) -> str:
        """Told without importing torch."""
        is_cpu = self._wanted == "cpu" or (self._wanted == "auto" and not gpus.count())
        return PRECISION_OF_CPU if is_cpu else PRECISION_OF_GPU

    @property
    def is_on_gpu(self) -> bool:
        return self._opened is not None and not self._opened.device.is_host

    @property
    def held(self) -> frozenset[Entry]:
        """The entries of the models in memory."""
        return frozenset(self._opened.held()) if self._opened else frozenset()

    @property
    def used_bytes(self) -> int:
        """What models fill, in RAM and on a GPU together."""
        return self._opened.used_bytes if self._opened else 0

    def residency(self, entry: Entry) -> Residency:
        """On a machine whose device is the CPU, what is held is in RAM."""
        level = self._opened.held().get(entry) if self._opened else None
        if level is not None:
            return level
        return Residency.REMOTE if entry.reference and not _is_whole(entry) else Residency.DISK

    def checkpoint(self, entry: CheckpointEntry, controlnets: Sequence[ControlNetEntry] = ()) -> Checkpoint:
        """Raises as the loaders do, or ResourceExhausted; the next call tries again."""
        return self._shelf().checkpoint(entry, controlnets=controlnets)

    def assembled(self, generation: Generation) -> Checkpoint:
        """The generation's checkpoint with its LoRAs, VAE, embeddings and ControlNets.

        FailedPrecondition where one is unfit.

        What it holds stays in memory until the last reference to it is gone.
        """
        from services.diffusion.models.marks import work_bytes

        shelf = self._shelf()
        return shelf.checkpoint(
            generation.checkpoint,
            controlnets=[control.controlnet for control in generation.controls],
            loras=generation.loras,
            vae=generation.vae,
            embeddings=generation.embeddings,
            tiny_vae=self._tiny_vae_of(generation.checkpoint) if generation.preview_every_steps else None,
            work_bytes=work_bytes(generation, shelf.device.dtype.itemsize),
        )

    @contextmanager
    def holding(self, name: str, load: Callable[[torch.dtype], Any]) -> Iterator[Any]:
        """A model that belongs to no other, such as a safety checker: on the device while this is open.

        In RAM where the device has no room for it.
        """
        lease = Lease()
        yield self._shelf().other(name, load, lease)
        # Here it ends, and not before.
        del lease

    def release(self) -> None:
        """Off the device with what no picture uses."""
        if self._opened is not None:
            self._opened.release()

    def _shelf(self) -> Shelf:
        """With the device, chosen once."""
        if self._opened is None:
            from services.diffusion.models.device import open_device
            from services.diffusion.models.shelf import Shelf

            device = (self._open_device or open_device)(self._wanted)
            self._opened = Shelf(device, ram_bytes=self._ram_bytes, vram_bytes=self._vram_bytes)
        return self._opened
