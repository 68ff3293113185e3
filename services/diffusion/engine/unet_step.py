"""One evaluation of the UNet for many images at once: noise prediction with guidance. For the device thread.

Changes no row. If the device is out of memory for a batch, the batch is evaluated in parts; if a row makes the batch
fail, each row is evaluated alone, and the error is that row's.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from fanlight.errors import FanlightError
from services.diffusion.engine.conditioning import Conditioning, time_ids
from services.diffusion.engine.controls import ControlRow, takes_embedded_images
from services.diffusion.engine.memory import OomRetry, out_of_memory_error
from services.diffusion.engine.row import Row
from services.diffusion.engine.row_batch import RowBatch
from services.diffusion.engine.transfers import as_type, upload
from services.diffusion.models.device import DeviceOutOfMemory, translate_oom
from services.diffusion.models.entries import Entry
from services.diffusion.models.faults import CONTENT_ERRORS, blames, fault_of, is_of_device
from services.diffusion.models.model_cache import Checkpoint

# The model's prediction for one row, (1, C, H/f, W/f); or why there is none for it.
NoisePrediction = Tensor | FanlightError


class Residuals(NamedTuple):
    """What ControlNets add to the UNet: one tensor for each of its down blocks' outputs, one for the middle."""

    down: list[Tensor]
    middle: Tensor


class Evaluation(NamedTuple):
    """One noise prediction of a batch: of which row, on what."""

    # The row's number.
    row: int
    conditioning: Conditioning
    # Of the prompt among those that AND composes; None for the unconditional one.
    weight: float | None


class UNetInputs(NamedTuple):
    """A batch for the UNet; with guidance the unconditional predictions come first.

    `sample`: (B, C, h, w); `timesteps`: (B,); `embeds`: (B, L, C).
    """

    sample: Tensor
    timesteps: Tensor
    embeds: Tensor
    # B of them.
    places: Sequence[Evaluation]
    # What was made once for these rows.
    batch: RowBatch
    # SDXL's further inputs: `text_embeds` (B, P) and `time_ids` (B, 6); None for the others.
    added: dict[str, Tensor] | None = None

    def at(self, numbers: Sequence[int], index: Tensor) -> "UNetInputs":
        """Those places of the batch alone. `numbers`: from 0 to B - 1; `index`: the same, (n,)."""
        if len(numbers) == len(self.places):
            return self
        added = {name: value.index_select(0, index) for name, value in self.added.items()} if self.added else None
        return self._replace(
            sample=self.sample.index_select(0, index),
            timesteps=self.timesteps.index_select(0, index),
            embeds=self.embeds.index_select(0, index),
            places=[self.places[number] for number in numbers],
            added=added,
        )


def predict(rows: Sequence[Row], retry: OomRetry) -> list[NoisePrediction]:
    """One prediction for each row, in order. Rows have one BatchKey; prompts of one length run together.

    Rows with other weights do not, as after a file was replaced. If the device is out of memory for all, they are
    evaluated in parts; a row that does not even fit alone gets an error in place of its prediction.
    """
    predictions: dict[int, NoisePrediction] = {}

    def alike(number: int) -> tuple[int, ...]:
        row = rows[number]
        nets = (id(control.net) for control in row.controls)
        return row.conditioning.length, id(row.checkpoint.unet), *nets

    for _, same in groupby(sorted(range(len(rows)), key=alike), key=alike):
        numbers = list(same)
        predictions.update(zip(numbers, _predict_in_parts([rows[number] for number in numbers], retry), strict=True))
    return [predictions[number] for number in range(len(rows))]


def _predict_in_parts(rows: Sequence[Row], retry: OomRetry) -> list[NoisePrediction]:
    """In parts of as many as fitted lately; if that is too much, after a release, then half as many each time."""
    first = rows[0]
    kind = (id(first.checkpoint.unet), first.conditioning.length, len(first.controls), first.shape)
    limit = retry.rows_limit(kind) or len(rows)
    predictions = _predict(rows[:limit])
    if predictions is None:
        retry.release()
        predictions = _predict(rows[:limit])
    while predictions is None and limit > 1:
        limit //= 2
        retry.learn(kind, limit)
        predictions = _predict(rows[:limit])
    if predictions is None:
        predictions = [out_of_memory_error(_ONE_IMAGE)]
    return predictions if limit >= len(rows) else predictions + _predict_in_parts(rows[limit:], retry)


def _predict(rows: Sequence[Row]) -> list[NoisePrediction] | None:
    """None if the device is out of memory."""
    try:
        with translate_oom():
            return [*_evaluate(rows)]
    except DeviceOutOfMemory:
        torch.cuda.empty_cache()
        return None
    except (FanlightError, *CONTENT_ERRORS) as error:
        if is_of_device(error):
            raise
        return _isolate(rows, error)


def _isolate(rows: Sequence[Row], error: Exception) -> list[NoisePrediction]:
    """What evaluating the rows together raised ends the row that raises it alone as well."""
    if len(rows) == 1:
        return [error if isinstance(error, FanlightError) else fault_of(_to_blame(rows[0]), error)]
    alone = [(_predict([row]) or [out_of_memory_error(_ONE_IMAGE)])[0] for row in rows]
    sound = [row for row, prediction in zip(rows, alone, strict=True) if isinstance(prediction, Tensor)]
    # Together again, so that they get the very numbers that they would have got without the others.
    together = _predict(sound) if 1 < len(sound) < len(rows) else None
    if together is None:
        return alone
    left = iter(together)
    return [next(left) if isinstance(prediction, Tensor) else prediction for prediction in alone]


_ONE_IMAGE = "generate an image of this size"


def _to_blame(row: Row) -> Entry:
    """The ControlNet without which the row can be evaluated; else the checkpoint."""
    for number, control in enumerate(row.controls):
        try:
            with translate_oom():
                _evaluate([row], without=number)
        except (DeviceOutOfMemory, FanlightError, *CONTENT_ERRORS):
            continue
        return control.entry
    return row.checkpoint.entry


def _evaluate(rows: Sequence[Row], *, without: int | None = None) -> list[Tensor]:
    """`without`: the number of a ControlNet that is left out."""
    inputs = _inputs(rows)
    residuals = _residuals(rows, inputs, without=without)
    output: Tensor = rows[0].checkpoint.unet(
        _with_extra_channels(rows, inputs),
        inputs.timesteps,
        encoder_hidden_states=inputs.embeds,
        timestep_cond=_guidance_embedding(rows, inputs),
        added_cond_kwargs=inputs.added,
        down_block_additional_residuals=residuals.down if residuals else None,
        mid_block_additional_residual=residuals.middle if residuals else None,
        return_dict=False,
    )[0]
    return _by_row(rows, inputs, output)


def _by_row(rows: Sequence[Row], inputs: UNetInputs, output: Tensor) -> list[Tensor]:
    """Each row's prediction (1, C, h, w), of those of all places, (B, C, h, w): in one operation without AND."""
    if len(inputs.places) == len(rows):
        return [*torch.split(output, 1)]
    if len(inputs.places) == 2 * len(rows) and all(place.weight is None for place in inputs.places[: len(rows)]):
        low, high = torch.split(as_type(output, torch.float32), len(rows))
        scales = inputs.batch.column("guidance", [row.generation.guidance_scale for row in rows], low)
        return [*torch.split(as_type(low + scales * (high - low), output.dtype), 1)]
    predictions: dict[int, list[tuple[float | None, Tensor]]] = {}
    for place, prediction in zip(inputs.places, torch.split(output, 1), strict=True):
        predictions.setdefault(place.row, []).append((place.weight, prediction))
    return [_composed(row, predictions[number]) for number, row in enumerate(rows)]


def _composed(row: Row, predictions: Sequence[tuple[float | None, Tensor]]) -> Tensor:
    """The row's prediction (1, C, h, w) from its own: the unconditional one, with guidance, comes first.

    Classifier-free guidance, Ho and Salimans 2022; several prompts by Liu et al. 2022 (composable diffusion), weighted
    as in A1111: the unconditional one plus scale x the sum of weight x (conditional - unconditional). Without guidance
    the first prompt's takes its place, and the scale is 1, as where A1111 leaves the unconditional one out.
    """
    is_guided = predictions[0][0] is None
    low, prompts = predictions[0][1], predictions[1:] if is_guided else predictions
    if not is_guided and len(prompts) == 1:
        return low
    scale = row.generation.guidance_scale if is_guided else 1.0
    # In float32, as those of a batch without AND: an image is the same beside others with it.
    base = composed = as_type(low, torch.float32)
    for weight, high in prompts:
        assert weight is not None
        factor = scale * weight if len(prompts) > 1 else scale
        composed = composed + factor * (as_type(high, torch.float32) - base)
    return as_type(composed, low.dtype)


def _inputs(rows: Sequence[Row]) -> UNetInputs:
    batch = RowBatch.of(rows)
    places = _places(rows)
    numbers = [place.row for place in places]
    sample, timesteps = batch.model_input(rows), batch.timesteps(rows)
    embeds, added = batch.once("conditioning", tuple(places), lambda: (_embeds(places), _added_cond(rows, places)))
    if len(places) > len(rows):
        index = batch.index("places", numbers, sample.device)
        sample, timesteps = sample.index_select(0, index), timesteps.index_select(0, index)
    return UNetInputs(sample, timesteps, embeds, places, batch, added)


def _embeds(places: Sequence[Evaluation]) -> Tensor:
    return torch.cat([place.conditioning.embeds for place in places])


def _places(rows: Sequence[Row]) -> list[Evaluation]:
    """All unconditional ones first, in the order of the rows, then the prompts of each row."""
    steps = [row.step_conditioning() for row in rows]
    unconditional = [Evaluation(n, step.unconditional, None) for n, step in enumerate(steps) if step.unconditional]
    return unconditional + [
        Evaluation(n, each, weight) for n, step in enumerate(steps) for each, weight in step.prompts
    ]


def _with_extra_channels(rows: Sequence[Row], inputs: UNetInputs) -> Tensor:
    """(B, more C, h, w) for a UNet made for inpainting; ControlNets take the latents alone."""
    numbers = tuple(place.row for place in inputs.places)
    extra = [rows[number].extra_channels for number in numbers]
    channels = [each for each in extra if each is not None]
    if not channels:
        return inputs.sample
    return torch.cat([inputs.sample, inputs.batch.once("extra", numbers, lambda: torch.cat(channels))], dim=1)


def _guidance_embedding(rows: Sequence[Row], inputs: UNetInputs) -> Tensor | None:
    """(B, C) for UNets that take the guidance scale as an input (LCM): its sines and cosines.

    As in VDM (arXiv 2107.00630).
    """
    size: int | None = rows[0].checkpoint.unet.config.time_cond_proj_dim
    if size is None:
        return None
    scales = tuple(rows[place.row].generation.guidance_scale for place in inputs.places)
    return inputs.batch.once("scales", scales, lambda: _embedded(scales, size, rows[0].checkpoint))


def _embedded(scales: Sequence[float], size: int, checkpoint: Checkpoint) -> Tensor:
    numbers = torch.tensor([(scale - 1) * 1000.0 for scale in scales])
    frequencies = torch.exp(torch.arange(size // 2) * (-math.log(10_000.0) / (size // 2 - 1)))
    angles = numbers[:, None] * frequencies[None]
    embedding = torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size % 2))
    return upload(embedding.to(checkpoint.dtype), checkpoint.device)


def _added_cond(rows: Sequence[Row], places: Sequence[Evaluation]) -> dict[str, Tensor] | None:
    pooled = [place.conditioning.pooled for place in places if place.conditioning.pooled is not None]
    if not pooled:
        return None
    ids = [
        time_ids(row.checkpoint, row.generation, is_unconditional=place.weight is None)
        for place, row in ((place, rows[place.row]) for place in places)
    ]
    return {"text_embeds": torch.cat(pooled), "time_ids": torch.cat(ids)}


def _residuals(rows: Sequence[Row], inputs: UNetInputs, *, without: int | None) -> Residuals | None:
    """The sum of all ControlNets' residuals; None if none conditions this evaluation. Errors name the ControlNet."""
    scales = [row.control_scales() for row in rows]
    total: Residuals | None = None
    for number in range(len(rows[0].controls)):
        net_scales = [row_scales[number] for row_scales in scales]
        if any(net_scales) and number != without:
            with blames(rows[0].controls[number].entry):
                total = _added(total, _one_net(number, [row.controls[number] for row in rows], net_scales, inputs))
    return total


def _one_net(which: int, controls: list[ControlRow], scales: list[float], inputs: UNetInputs) -> Residuals:
    """One ControlNet for those places of the batch that it conditions now; the others get zeros.

    `which`: its number among the rows' ControlNets.
    """
    net, batch, sample = controls[0].net, inputs.batch, inputs.sample
    numbers = [
        number
        for number, place in enumerate(inputs.places)
        if scales[place.row] and (place.weight is not None or not controls[place.row].is_one_sided)
    ]
    at = batch.index(f"net {which}", numbers, sample.device)
    here = inputs.at(numbers, at)
    places = tuple(place.row for place in here.places)
    conditions = batch.once(f"images {which}", places, lambda: torch.cat([controls[row].condition for row in places]))
    with takes_embedded_images(net):
        down, middle = net(
            here.sample,
            here.timesteps,
            encoder_hidden_states=here.embeds,
            added_cond_kwargs=here.added,
            controlnet_cond=conditions,
            conditioning_scale=batch.column(f"scales {which}", [scales[row] for row in places], sample),
            return_dict=False,
        )
    weights = [controls[row].weights(len(down) + 1) for row in places]
    residuals = _weighted(Residuals(list(down), middle), weights, batch, which)
    if len(places) == len(sample):
        return residuals
    total = len(sample)
    return Residuals([_spread(part, at, total) for part in residuals.down], _spread(residuals.middle, at, total))


def _weighted(residuals: Residuals, weights: list[list[float]], batch: RowBatch, which: int) -> Residuals:
    """Each place's residuals times its weights, the middle's last."""
    parts = [*residuals.down, residuals.middle]
    if all(weight == 1.0 for each in weights for weight in each):
        return residuals
    weighted = [
        part * batch.column(f"weights {which} {number}", column, part)
        for number, (part, column) in enumerate(zip(parts, zip(*weights, strict=True), strict=True))
    ]
    return Residuals(weighted[:-1], weighted[-1])


def _spread(part: Tensor, at: Tensor, count: int) -> Tensor:
    """(len(at), ...) to (count, ...), zeros elsewhere."""
    return part.new_zeros((count, *part.shape[1:])).index_copy(0, at, part)


def _added(total: Residuals | None, more: Residuals) -> Residuals:
    if total is None:
        return more
    return Residuals([a + b for a, b in zip(total.down, more.down, strict=True)], total.middle + more.middle)
