"""Models in memory: loaded on first use and kept. For the device thread; `held` may be read from any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.kernel.logs import get_logger

if TYPE_CHECKING:
    from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
    from services.diffusion.models.loading import Checkpoint

log = get_logger()


class Library:
    """Imports torch and diffusers when the first model is asked for, so that a process starts without them."""

    def __init__(self, *, device: str) -> None:
        """`device`: `auto`, `cpu`, `cuda` or `cuda:N`."""
        self._wanted = device
        self._device: Any = None
        self._checkpoints: dict[str, Checkpoint] = {}
        self._controlnets: dict[ControlNetEntry, Any] = {}
        # Such as `cpu` or `cuda:NVIDIA GeForce RTX 3060`; empty until the first model is asked for.
        self.device_name = ""

    @property
    def held(self) -> frozenset[object]:
        """The entries of the models in memory."""
        checkpoints = [checkpoint.entry for checkpoint in tuple(self._checkpoints.values())]
        return frozenset([*checkpoints, *tuple(self._controlnets)])

    @property
    def is_on_gpu(self) -> bool:
        return self.device_name not in ("", "cpu")

    def checkpoint(self, entry: CheckpointEntry) -> Checkpoint:
        """Raises as `load_checkpoint` does; the next call tries again."""
        if entry.id not in self._checkpoints:
            device = self._open()
            from services.diffusion.models.loading import load_checkpoint

            self._checkpoints[entry.id] = load_checkpoint(entry, device)
            log.info("model_loaded", kind="checkpoint", id=entry.id, device=self.device_name)
        return self._checkpoints[entry.id]

    def controlnet(self, entry: ControlNetEntry) -> Any:
        """Raises as `load_controlnet` does; the next call tries again."""
        if entry not in self._controlnets:
            device = self._open()
            from services.diffusion.models.loading import load_controlnet

            self._controlnets[entry] = load_controlnet(entry, device)
            log.info("model_loaded", kind="controlnet", id=entry.id, device=self.device_name)
        return self._controlnets[entry]

    def _open(self) -> Any:
        """The device, chosen once."""
        if self._device is None:
            from services.diffusion.models.device import open_device

            self._device, self.device_name = open_device(self._wanted)
        return self._device
