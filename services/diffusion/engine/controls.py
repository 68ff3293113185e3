"""ControlNets' parts in one picture: what they look at, and how strongly they condition when. For the device thread."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from services.diffusion.engine.byte_cache import ByteCache
from services.diffusion.generation import Control, Generation
from services.diffusion.models.loading import Checkpoint
from services.diffusion.models.marks import mark
from services.diffusion.pictures.tensors import to_condition

CONDITIONS_LIMIT_BYTES = 256 * 2**20

_AS_IT_IS = torch.nn.Identity()


class Conditions:
    """Control images as the nets look at them, kept: the pictures of a job, and of the next one, share them."""

    def __init__(self) -> None:
        self._cache: ByteCache[Tensor] = ByteCache(limit_bytes=CONDITIONS_LIMIT_BYTES, size_of=lambda each: each.nbytes)

    def clear(self) -> None:
        self._cache.clear()

    def get(self, control: Control, net: Any, checkpoint: Checkpoint) -> Tensor:
        entry = control.controlnet
        key = (entry, mark(entry.path, ""), str(checkpoint.dtype), *_digests(control))
        return self._cache.get(key, lambda: _look_at(control, net, checkpoint))


class ControlRow:
    """One ControlNet's part in one picture."""

    def __init__(self, control: Control, net: Any, condition: Tensor, *, guess_mode: bool) -> None:
        """`condition`: as Conditions gives it."""
        self.net = net
        self.condition = condition
        self._control = control
        self._guess_mode = guess_mode

    def scale_at(self, index: int, count: int) -> float:
        """How strongly it conditions evaluation `index` of `count`; 0 outside of its start and end."""
        control = self._control
        if index / count < control.start or (index + 1) / count > control.end:
            return 0.0
        return control.scale

    @property
    def is_one_sided(self) -> bool:
        """It conditions the prompt's side alone. So do nets that pool their residuals globally, such as shuffle."""
        return self._guess_mode or bool(self.net.config.global_pool_conditions)

    @property
    def is_graded(self) -> bool:
        """Its residuals count the more the deeper they are: a guess is about the whole, not about lines."""
        return self._guess_mode and not self.net.config.global_pool_conditions


def control_rows(
    generation: Generation, checkpoint: Checkpoint, nets: list[Any], conditions: Conditions
) -> list[ControlRow]:
    return [
        ControlRow(control, net, conditions.get(control, net, checkpoint), guess_mode=generation.guess_mode)
        for control, net in zip(generation.controls, nets, strict=True)
    ]


@contextmanager
def looking_at_conditions(net: Any) -> Iterator[None]:
    """Inside, the net takes conditions for what its own embedding made of the control image."""
    if not _is_embedded_once(net):
        yield
        return
    embedding = net.controlnet_cond_embedding
    net.controlnet_cond_embedding = _AS_IT_IS
    try:
        yield
    finally:
        net.controlnet_cond_embedding = embedding


def _look_at(control: Control, net: Any, checkpoint: Checkpoint) -> Tensor:
    """The embedding, which is the same in every step and up to 5 % of a net's work."""
    pixels = to_condition(control.image, control.mask).to(checkpoint.device, checkpoint.dtype)
    condition: Tensor = net.controlnet_cond_embedding(pixels) if _is_embedded_once(net) else pixels
    return condition


def _is_embedded_once(net: Any) -> bool:
    """A net that wants its channels in another order turns them itself, before it embeds them."""
    return bool(net.config.controlnet_conditioning_channel_order == "rgb")


def _digests(control: Control) -> list[bytes]:
    images = [image for image in (control.image, control.mask) if image is not None]
    return [hashlib.sha256(image.tobytes()).digest() + repr(image.size).encode() for image in images]
