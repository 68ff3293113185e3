"""One evaluation of the model for many pictures at once. For the device thread; changes no row."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from fanlight.errors import ResourceExhausted
from services.diffusion.engine.controls import ControlRow, looking_at_conditions
from services.diffusion.engine.rows import Row
from services.diffusion.engine.shortage import Relief, no_room
from services.diffusion.models.shortage import NoRoom, noticed
from services.diffusion.prompt.encode import Conditioning
from services.diffusion.prompt.time_ids import time_ids

# What the model says of one row; or why the row must go.
Said = Tensor | ResourceExhausted


class Residuals(NamedTuple):
    """What ControlNets add to the UNet: one tensor for each of its down blocks' outputs, one for the middle."""

    down: list[Tensor]
    middle: Tensor


class Inputs(NamedTuple):
    """A batch for the UNet: with guidance the negative prompts' half comes first."""

    sample: Tensor
    timesteps: Tensor
    words: Tensor
    # What SDXL looks at beside the words: `text_embeds` and `time_ids`; None for the others.
    added: dict[str, Tensor] | None = None

    def at(self, places: Tensor) -> "Inputs":
        """Those places of the batch alone."""
        added = {name: value[places] for name, value in self.added.items()} if self.added else None
        return Inputs(self.sample[places], self.timesteps[places], self.words[places], added)


def predict(rows: Sequence[Row], relief: Relief) -> list[Said]:
    """What the model says for each row, in order. Rows have one BatchKey; prompts of one length run together.

    Where the device has no room for all, they are evaluated in parts; a row that does not even fit alone is told so.
    """
    predictions: dict[int, Said] = {}
    order = sorted(range(len(rows)), key=lambda number: rows[number].wanted.words.shape[1])
    for _, same in groupby(order, key=lambda number: rows[number].wanted.words.shape[1]):
        numbers = list(same)
        predictions.update(zip(numbers, _fitting([rows[number] for number in numbers], relief), strict=True))
    return [predictions[number] for number in range(len(rows))]


def _fitting(rows: Sequence[Row], relief: Relief) -> list[Said]:
    """In parts of as many as fitted lately; where that is too much, all idle things go, and then every other row."""
    kind = (id(rows[0].checkpoint.unet), rows[0].wanted.words.shape[1], len(rows[0].controls), rows[0].latents.shape)
    limit = relief.rows_limit(kind) or len(rows)
    said = _tried(rows[:limit])
    if said is None:
        relief.release()
        said = _tried(rows[:limit])
    while said is None and limit > 1:
        limit //= 2
        relief.learn(kind, limit)
        said = _tried(rows[:limit])
    if said is None:
        said = [no_room("paint a picture of this size")]
    return said if limit >= len(rows) else said + _fitting(rows[limit:], relief)


def _tried(rows: Sequence[Row]) -> list[Said] | None:
    """None where the device has no room for them."""
    try:
        with noticed():
            return [*_together(rows)]
    except NoRoom:
        torch.cuda.empty_cache()
        return None


def _together(rows: Sequence[Row]) -> list[Tensor]:
    inputs = _inputs(rows)
    residuals = _residuals(rows, inputs)
    said: Tensor = rows[0].checkpoint.unet(
        _with_beside(rows, inputs.sample),
        inputs.timesteps,
        encoder_hidden_states=inputs.words,
        timestep_cond=_guidance_embedding(rows),
        added_cond_kwargs=inputs.added,
        down_block_additional_residuals=residuals.down if residuals else None,
        mid_block_additional_residual=residuals.middle if residuals else None,
        return_dict=False,
    )[0]
    if not rows[0].generation.is_guided:
        return list(torch.split(said, 1))
    without, with_prompt = (torch.split(half, 1) for half in said.chunk(2))
    return [
        low + row.generation.guidance_scale * (high - low)
        for row, low, high in zip(rows, without, with_prompt, strict=True)
    ]


def _inputs(rows: Sequence[Row]) -> Inputs:
    sample = torch.cat([row.model_input() for row in rows])
    timesteps = torch.stack([row.timestep.float() for row in rows]).to(sample.device)
    unwanted = [row.unwanted for row in rows if row.unwanted is not None]
    prompts = [*unwanted, *(row.wanted for row in rows)]
    halves = len(prompts) // len(rows)
    words = torch.cat([prompt.words for prompt in prompts])
    return Inputs(torch.cat([sample] * halves), torch.cat([timesteps] * halves), words, _added_cond(rows, prompts))


def _with_beside(rows: Sequence[Row], sample: Tensor) -> Tensor:
    """What a UNet made for inpainting takes; ControlNets take the latents alone."""
    beside = [row.beside for row in rows if row.beside is not None]
    if not beside:
        return sample
    return torch.cat([sample, torch.cat(beside * (len(sample) // len(rows)))], dim=1)


def _guidance_embedding(rows: Sequence[Row]) -> Tensor | None:
    """(B, C) for UNets that are told the guidance scale: sines and cosines of it, as in VDM (arXiv 2107.00630)."""
    size: int | None = rows[0].checkpoint.unet.config.time_cond_proj_dim
    if size is None:
        return None
    scales = torch.tensor([(row.generation.guidance_scale - 1) * 1000.0 for row in rows])
    frequencies = torch.exp(torch.arange(size // 2) * (-math.log(10_000.0) / (size // 2 - 1)))
    angles = scales[:, None] * frequencies[None]
    embedding = torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size % 2))
    return embedding.to(rows[0].latents)


def _added_cond(rows: Sequence[Row], prompts: Sequence[Conditioning]) -> dict[str, Tensor] | None:
    """`prompts`: the negative ones first, as in Inputs."""
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    if not pooled:
        return None
    wanted = [False, True] if rows[0].unwanted is not None else [True]
    ids = [time_ids(row.checkpoint, row.generation, is_wanted=each) for each in wanted for row in rows]
    return {"text_embeds": torch.cat(pooled), "time_ids": torch.cat(ids)}


def _residuals(rows: Sequence[Row], inputs: Inputs) -> Residuals | None:
    """The sum of all ControlNets' residuals; None where none conditions this evaluation."""
    scales = [row.control_scales() for row in rows]
    total: Residuals | None = None
    for number in range(len(rows[0].controls)):
        net_scales = [row_scales[number] for row_scales in scales]
        if any(net_scales):
            total = _added(total, _one_net([row.controls[number] for row in rows], net_scales, inputs))
    return total


def _one_net(controls: list[ControlRow], scales: list[float], inputs: Inputs) -> Residuals:
    """One ControlNet for those places of the batch that it conditions now; the others get zeros."""
    net, count, last_half = controls[0].net, len(controls), len(inputs.sample) // len(controls) - 1
    places = [
        (half, row)
        for half in range(last_half + 1)
        for row, scale in enumerate(scales)
        if scale and (half == last_half or not controls[row].is_one_sided)
    ]
    at = torch.tensor([half * count + row for half, row in places], device=inputs.sample.device)
    here = inputs.at(at)
    with looking_at_conditions(net):
        down, middle = net(
            here.sample,
            here.timesteps,
            encoder_hidden_states=here.words,
            added_cond_kwargs=here.added,
            controlnet_cond=torch.cat([controls[row].condition for _, row in places]),
            conditioning_scale=_column(here.sample, [scales[row] for _, row in places]),
            return_dict=False,
        )
    residuals = _graded(Residuals(list(down), middle), [controls[row].is_graded for _, row in places])
    if len(places) == len(inputs.sample):
        return residuals
    total = len(inputs.sample)
    return Residuals([_spread(part, at, total) for part in residuals.down], _spread(residuals.middle, at, total))


def _graded(residuals: Residuals, is_graded: list[bool]) -> Residuals:
    """From a tenth at the picture's own size to all in the middle, as in ControlNet's guess mode."""
    if not any(is_graded):
        return residuals
    factors = torch.logspace(-1, 0, len(residuals.down) + 1).tolist()
    down = [
        part * _column(part, [factor if graded else 1.0 for graded in is_graded])
        for part, factor in zip(residuals.down, factors[:-1], strict=True)
    ]
    return Residuals(down, residuals.middle)


def _column(like: Tensor, values: list[float]) -> Tensor:
    """(len(values), 1, 1, 1), to multiply a batch by."""
    return like.new_tensor(values).view(-1, 1, 1, 1)


def _spread(part: Tensor, at: Tensor, count: int) -> Tensor:
    """(len(at), ...) to (count, ...), zeros elsewhere."""
    return part.new_zeros((count, *part.shape[1:])).index_copy(0, at, part)


def _added(total: Residuals | None, more: Residuals) -> Residuals:
    if total is None:
        return more
    return Residuals([a + b for a, b in zip(total.down, more.down, strict=True)], total.middle + more.middle)
