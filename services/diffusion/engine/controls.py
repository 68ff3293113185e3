"""ControlNets in one image: their control images, and how strongly they condition when. For the device thread."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fanlight.contract.generation import CONTROL_MODES
from services.diffusion.engine.generation import ControlInput, Generation
from services.diffusion.engine.vae import to_condition
from services.diffusion.models.entries import ControlNetEntry, fingerprint
from services.diffusion.models.faults import blames
from services.diffusion.models.model_cache import Checkpoint
from services.kernel.blobs import ByteLru

PROMPT, CONTROL = CONTROL_MODES[1:]
SOFT_WEIGHT, SD1_RESIDUALS = 0.825, 13
CACHE_LIMIT_BYTES = 256 * 2**20
_IDENTITY = torch.nn.Identity()


class ControlEmbeddingCache:
    """Byte-bounded LRU cache of embedded control images, which the images of a job share. For one thread."""

    def __init__(self) -> None:
        self._cache: ByteLru[tuple[object, ...], Tensor] = ByteLru(
            limit_bytes=CACHE_LIMIT_BYTES, size_of=lambda each: each.nbytes
        )

    def clear(self) -> None:
        self._cache.clear()

    def get(self, control: ControlInput, net: Any, checkpoint: Checkpoint) -> Tensor:
        """The net's embedding of the control image, (1, C, H/f, W/f).

        For a net that takes its channels as BGR it is the image itself, (1, 3, H, W) in [0, 1].
        """
        entry = control.controlnet
        key = (entry, fingerprint(entry.path, ""), str(checkpoint.dtype), *_digests(control))
        condition = self._cache.get(key)
        if condition is None:
            condition = _embed(control, net, checkpoint)
            self._cache.put(key, condition)
        return condition


class ControlRow:
    """One ControlNet's part in one image."""

    def __init__(self, control: ControlInput, net: Any, condition: Tensor, *, guess_mode: bool) -> None:
        """`condition`: as ControlEmbeddingCache gives it."""
        self.net = net
        self.condition = condition
        self._control = control
        self._guess_mode = guess_mode

    @property
    def entry(self) -> ControlNetEntry:
        return self._control.controlnet

    def scale_at(self, index: int, count: int) -> float:
        """How strongly it conditions evaluation `index` of `count`; 0 outside of its start and end."""
        control = self._control
        if index / count < control.start or (index + 1) / count > control.end:
            return 0.0
        return control.scale

    @property
    def is_one_sided(self) -> bool:
        """It adds to the conditional half alone. So do nets that pool their residuals globally, such as shuffle."""
        return self._guesses or self._control.mode == CONTROL or bool(self.net.config.global_pool_conditions)

    @property
    def _guesses(self) -> bool:
        return self._guess_mode and not self._control.mode

    def weights(self, count: int) -> list[float]:
        """What its `count` residuals count, the middle one's last: the more, the deeper they are.

        In a mode, those of A1111's ControlNet extension (hook.py), whose last weight is of SD 1's thirteenth residual.
        In guess mode diffusers', which leave nets that pool globally as they are. Else all 1.
        """
        if self._control.mode in (PROMPT, CONTROL):
            return [SOFT_WEIGHT ** (SD1_RESIDUALS - 1 - index) for index in range(count)]
        if self._guesses and not self.net.config.global_pool_conditions:
            return torch.logspace(-1, 0, count).tolist()
        return [1.0] * count


def control_rows(
    generation: Generation, checkpoint: Checkpoint, nets: list[Any], cache: ControlEmbeddingCache
) -> list[ControlRow]:
    """UnusableModel names a net that cannot take its control image."""
    rows = []
    for control, net in zip(generation.controls, nets, strict=True):
        with blames(control.controlnet):
            condition = cache.get(control, net, checkpoint)
        rows.append(ControlRow(control, net, condition, guess_mode=generation.guess_mode))
    return rows


@contextmanager
def takes_embedded_images(net: Any) -> Iterator[None]:
    """Inside, the net takes its own embedding of the control image in place of the control image."""
    if not _is_embedded_once(net):
        yield
        return
    embedding = net.controlnet_cond_embedding
    net.controlnet_cond_embedding = _IDENTITY
    try:
        yield
    finally:
        net.controlnet_cond_embedding = embedding


def _embed(control: ControlInput, net: Any, checkpoint: Checkpoint) -> Tensor:
    """The embedding, which is the same in every step and up to 5 % of a net's work."""
    pixels = to_condition(control.image, control.mask).to(checkpoint.device, checkpoint.dtype)
    condition: Tensor = net.controlnet_cond_embedding(pixels) if _is_embedded_once(net) else pixels
    return condition


def _is_embedded_once(net: Any) -> bool:
    """A net that takes its channels in another order swaps them itself, before it embeds them."""
    return bool(net.config.controlnet_conditioning_channel_order == "rgb")


def _digests(control: ControlInput) -> list[bytes]:
    images = [image for image in (control.image, control.mask) if image is not None]
    return [hashlib.sha256(image.tobytes()).digest() + repr(image.size).encode() for image in images]
