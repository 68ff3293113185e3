"""Rows take a step with the model's predictions; what goes wrong with one ends that one. For the device thread."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from fanlight.errors import FanlightError, ResourceExhausted
from services.diffusion.engine.memory import OomRetry, out_of_memory_error
from services.diffusion.engine.row import Row, are_finite, misfit
from services.diffusion.engine.row_batch import RowBatch
from services.diffusion.engine.unet_step import NoisePrediction
from services.diffusion.models.device import DeviceOutOfMemory, translate_oom


class StepOutcome(NamedTuple):
    """`error`: what keeps the row from going on. `is_finite`: False once its numbers are known not to be finite."""

    error: FanlightError | None = None
    is_finite: bool = True


class _Move(NamedTuple):
    number: int
    row: Row
    prediction: Tensor


def take_steps(rows: Sequence[Row], predictions: Sequence[NoisePrediction], retry: OomRetry) -> list[StepOutcome]:
    """In order."""
    outcomes: dict[int, StepOutcome] = {}
    moves: list[_Move] = []
    for number, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        error = prediction if isinstance(prediction, FanlightError) else misfit(row, prediction)
        if error is not None:
            outcomes[number] = StepOutcome(error)
        else:
            assert isinstance(prediction, Tensor)
            moves.append(_Move(number, row, prediction))
    # As the predictions were made: rows with other weights, or in parts.
    for _, same in groupby(sorted(moves, key=_batch), key=_batch):
        own = [*same]
        outcomes.update(zip((move.number for move in own), _together(own, retry), strict=True))
    return [outcomes[number] for number in range(len(rows))]


def _batch(move: _Move) -> int:
    return 0 if move.row.batched is None else id(move.row.batched.batch)


def _together(moves: Sequence[_Move], retry: OomRetry) -> list[StepOutcome]:
    """ResourceExhausted ends all of them where there is no memory for the step of those with tables."""
    rows, predictions = [move.row for move in moves], [move.prediction for move in moves]
    try:
        batch = retry.retry_after_release(lambda: RowBatch.of(rows), "take a step of these images")
        retry.retry_after_release(lambda: batch.advance(rows, predictions), "take a step of these images")
        errors = [_alone(move) for move in moves]
        if any(errors):
            return [*_waited_for(moves, errors)]
        retry.retry_after_release(lambda: batch.post_flags(rows), "check these images")
    except ResourceExhausted as error:
        return [StepOutcome(error)] * len(moves)
    return [StepOutcome(is_finite=each) for each in batch.are_finite(rows)]


def _alone(move: _Move) -> FanlightError | None:
    """The step of one without a table; where that ran out of memory half way, it cannot be retried."""
    if move.row.sampler.table is not None:
        return None
    try:
        with translate_oom():
            move.row.advance(move.prediction)
    except DeviceOutOfMemory:
        return out_of_memory_error("take a step of this image")
    except FanlightError as error:
        return error
    return None


def _waited_for(moves: Sequence[_Move], errors: Sequence[FanlightError | None]) -> Iterator[StepOutcome]:
    """Where one has failed, which is rare, the others are waited for."""
    for move, error in zip(moves, errors, strict=True):
        yield StepOutcome(error, is_finite=error is not None or are_finite([move.row]) == [True])
