"""Rows that are evaluated together: their latents in one tensor, their steps in one operation. For the device thread.

Nothing here waits for the device. A new batch is made when a row joins or leaves, and moves what its rows remember;
between, each step takes its numbers from tables that were uploaded then.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.diffusion.engine.row import BatchPlace, InpaintState, Row
from services.diffusion.engine.transfers import HostFlags, as_type, upload
from services.diffusion.step_tables import StepTable

Value = TypeVar("Value")


class RowBatch:
    """Keep no reference to one for longer than an evaluation: its rows keep it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._count = len(rows)
        self._kept: dict[str, tuple[Hashable, Any]] = {}
        tabled = [row for row in rows if row.sampler.table is not None]
        # Of the rows that have tables.
        self.steps = FusedSteps(tabled) if tabled else None
        self.flags = HostFlags()
        places = iter(range(len(tabled)))
        for number, row in enumerate(rows):
            place = next(places) if row.sampler.table is not None else None
            row.batched = BatchPlace(self, number)
            if place is not None:
                assert self.steps is not None
                row.held = FusedRow(steps=self.steps, place=place)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "RowBatch":
        """The batch of exactly these rows, in this order; a new one where they are in none."""
        found = rows[0].batched
        if found is not None and isinstance(found.batch, cls) and found.batch._is_of(rows):
            return found.batch
        return cls(rows)

    def _is_of(self, rows: Sequence[Row]) -> bool:
        """Whether these are its rows, unchanged by others, and none of them has ended."""
        return (
            len(rows) == self._count
            and all(
                row.batched is not None
                and row.batched.batch is self
                and row.batched.number == number
                and (row.sampler.table is None or row.held is not None)
                for number, row in enumerate(rows)
            )
            and (self.steps is None or not self.steps.is_over)
        )

    def once(self, name: str, key: Hashable, make: Callable[[], Value]) -> Value:
        """What `make` gives, kept until the key is another."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            kept = self._kept[name] = key, make()
        value: Value = kept[1]
        return value

    def column(self, name: str, values: Sequence[float], like: Tensor) -> Tensor:
        """(len(values), 1, 1, 1), to multiply a batch such as `like` by; uploaded once."""
        key = tuple(values), like.dtype
        return self.once(name, key, lambda: _column(key[0], like))

    def index(self, name: str, numbers: Sequence[int], device: torch.device) -> Tensor:
        """(len(numbers),), uploaded once."""
        key = tuple(numbers)
        return self.once(name, key, lambda: upload(torch.tensor(key), device))

    def model_input(self, rows: Sequence[Row]) -> Tensor:
        """The rows' latents, scaled as the model takes them now, (B, C, h, w)."""
        dtype = rows[0].checkpoint.dtype
        if self.steps is None:
            return torch.cat([row.model_input() for row in rows])
        scaled = as_type(self.steps.model_input(), dtype)
        if self.steps.count == len(rows):
            return scaled
        parts = iter(torch.split(scaled, 1))
        return torch.cat([next(parts) if row.sampler.table is not None else row.model_input() for row in rows])

    def timesteps(self, rows: Sequence[Row]) -> Tensor:
        """(B,) on the device."""
        if self.steps is not None and self.steps.count == len(rows):
            return self.steps.timesteps()
        numbers = [_timestep(row) for row in rows]
        return self.once("timesteps", tuple(numbers), lambda: upload(torch.tensor(numbers), rows[0].checkpoint.device))

    def advance(self, rows: Sequence[Row], predictions: Sequence[Tensor]) -> None:
        """Take one step with the model's predictions for those rows that have tables."""
        if self.steps is None:
            return
        tabled = [n for n, row in enumerate(rows) if row.sampler.table is not None]
        self.steps.advance([rows[n] for n in tabled], torch.cat([predictions[n] for n in tabled]))

    def post_flags(self, rows: Sequence[Row]) -> None:
        """Start to read which rows' latents are finite."""
        parts = [torch.isfinite(row.latents).all().reshape(1) for row in rows if row.sampler.table is None]
        if self.steps is None:
            self.flags.post(torch.cat(parts))
            return
        own = self.steps.are_finite()
        self.flags.post(torch.cat([own, *parts]) if parts else own)

    def are_finite(self, rows: Sequence[Row]) -> list[bool]:
        """As last posted; on a card as posted a step before, unless a row is finished: the device never idles."""
        flags = self.flags.read(is_last=any(row.is_finished for row in rows))
        if flags is None:
            return [True] * len(rows)
        tabled = [n for n, row in enumerate(rows) if row.sampler.table is not None]
        others = [n for n, row in enumerate(rows) if row.sampler.table is None]
        by_row = dict(zip([*tabled, *others], flags, strict=True))
        return [by_row[n] for n in range(len(rows))]


def _timestep(row: Row) -> float:
    table = row.sampler.table
    return float(row.timestep()) if table is None else float(table.timesteps[row.index])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(torch.tensor(values, dtype=like.dtype).reshape(-1, 1, 1, 1), like.device)


class FusedSteps:
    """The latents of B rows and what their tables' steps remember, (B, 1 + R, C, h, w) in float32.

    R is the most that any of them remembers; the others have zeros there.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.count = len(rows)
        tables = [_table(row) for row in rows]
        self._remembered = max(table.remembered for table in tables)
        self._has_noise = any(any(table.draws) for table in tables)
        self.state = torch.stack([_padded(row.state(), 1 + self._remembered) for row in rows])
        self.predicted = self.state[:, 0]
        self._numbers = _Numbers(rows, tables, self._remembered, has_noise=self._has_noise, like=self.state)
        self._left = self._numbers.steps
        self._at = 0
        # What was drawn for the step that is being taken.
        self._drawn: list[Tensor | None] | None = None
        inpainted = [number for number, row in enumerate(rows) if row.inpaint is not None]
        self._inpaint = _FusedInpaint(rows, inpainted, self._numbers.steps, like=self.state) if inpainted else None

    @property
    def is_over(self) -> bool:
        """Whether a row has taken its last step."""
        return self._at == self._left

    def model_input(self) -> Tensor:
        """(B, C, h, w)."""
        scales = self._numbers.scales[self._at]
        latents = self.state[:, 0]
        return latents if scales is None else latents * scales

    def timesteps(self) -> Tensor:
        """(B,)."""
        return self._numbers.timesteps[self._at]

    def advance(self, rows: Sequence[Row], predictions: Tensor) -> None:
        """`predictions`: (B, C, h, w). Changes nothing where there is no memory for it, and can be tried again."""
        parts = [self.state, as_type(predictions, torch.float32).unsqueeze(1)]
        if self._has_noise:
            parts.append(self._noise(rows))
        operand = torch.cat(parts, dim=1).unsqueeze(1)
        made = (self._numbers.matrices[self._at] * operand).sum(2)
        state, predicted = torch.split(made, [1 + self._remembered, 1], dim=1)
        if self._inpaint is not None:
            self._inpaint.put_back(state, self._at)
        self.state, self.predicted = state, predicted.squeeze(1)
        self._at += 1
        self._drawn = None
        for row in rows:
            row.index += 1

    def are_finite(self) -> Tensor:
        """(B,), of the latents."""
        return torch.isfinite(self.state[:, 0]).flatten(1).all(1)

    def _noise(self, rows: Sequence[Row]) -> Tensor:
        """(B, 1, C, h, w), drawn on the host as each row's own; zeros for those that take none now."""
        if self._drawn is None:
            self._drawn = [row.sampler.draw(row.index) for row in rows]
        drawn = self._drawn
        zeros = None if all(each is not None for each in drawn) else torch.zeros(rows[0].shape)
        noise = torch.stack([cast(Tensor, zeros) if each is None else each for each in drawn])
        return upload(noise, self.state.device)


@dataclass(frozen=True, slots=True, eq=False)
class FusedRow:
    """A row's place in FusedSteps."""

    steps: FusedSteps
    place: int

    def latents(self) -> Tensor:
        return self.steps.state[self.place, :1]

    def predicted(self) -> Tensor:
        return self.steps.predicted[self.place : self.place + 1]

    def state(self) -> Tensor:
        return self.steps.state[self.place]


class _Numbers:
    """What B rows' tables say about their next steps, up to the first one's last; on the device, split by step."""

    def __init__(
        self, rows: Sequence[Row], tables: Sequence[StepTable], remembered: int, *, has_noise: bool, like: Tensor
    ) -> None:
        self.steps = min(row.evaluations - row.index for row in rows)
        outputs, inputs = remembered + 2, remembered + 2 + has_noise
        spans = [(table, slice(row.index, row.index + self.steps)) for row, table in zip(rows, tables, strict=True)]
        scales = np.stack([table.scales[span] for table, span in spans], axis=1)
        table = np.concatenate(
            [
                np.stack([table.timesteps[span] for table, span in spans], axis=1)[..., None],
                scales[..., None],
                np.stack([_widened(table.matrices[span], outputs, inputs) for table, span in spans], axis=1),
            ],
            axis=2,
        )
        on_device = upload(torch.from_numpy(table), like.device)
        timesteps, scaled, matrices = torch.split(on_device, [1, 1, outputs * inputs], dim=2)
        self.timesteps = timesteps.squeeze(2).unbind(0)
        columns = scaled.reshape(self.steps, len(rows), 1, 1, 1).unbind(0)
        self.scales = [None if (own == 1.0).all() else column for own, column in zip(scales, columns, strict=True)]
        self.matrices = matrices.reshape(self.steps, len(rows), outputs, inputs, 1, 1, 1).unbind(0)


def _widened(matrices: NDArray[np.float32], outputs: int, inputs: int) -> NDArray[np.float32]:
    """A row's matrices (steps, 1 + r + 1, 1 + r + 2), flat, for a batch that remembers more or draws no noise."""
    wide = np.zeros((len(matrices), outputs, inputs), dtype=np.float32)
    size, most = matrices.shape[1] - 1, outputs - 1
    for target, source in ((slice(0, size), slice(0, size)), (slice(most, most + 1), slice(size, size + 1))):
        wide[:, target, :size] = matrices[:, source, :size]
        wide[:, target, most:inputs] = matrices[:, source, size : size + inputs - most]
    return wide.reshape(len(matrices), outputs * inputs)


class _FusedInpaint:
    """What inpainting with an ordinary UNet keeps, see InpaintState, of those rows that it is for."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int], steps: int, *, like: Tensor) -> None:
        kept = [cast(InpaintState, rows[number].inpaint) for number in numbers]
        self._original = torch.cat([each.original.float() for each in kept])
        self._noise = torch.cat([each.noise.float() for each in kept])
        self._mask = torch.cat([each.mask.float() for each in kept])
        self._at = upload(torch.tensor(numbers), like.device)
        spans = [(rows[number], slice(rows[number].index, rows[number].index + steps)) for number in numbers]
        levels = np.stack([_table(row).levels[span] for row, span in spans], axis=1)
        bounds = np.stack([1 - (np.arange(span.start, span.stop) + 1) / row.evaluations for row, span in spans], axis=1)
        table = np.concatenate([levels, bounds[..., None]], axis=2).astype(np.float32)
        on_device = upload(torch.from_numpy(table), like.device)
        self._numbers = [each.unbind(0) for each in on_device.reshape(steps, len(numbers), 3, 1, 1, 1).unbind(2)]

    def put_back(self, state: Tensor, step: int) -> None:
        """Changes the latents in `state`, (B, 1 + R, C, h, w)."""
        original, noise, bound = (numbers[step] for numbers in self._numbers)
        latents = state[:, 0]
        kept = torch.addcmul(self._original * original, self._noise, noise)
        own = torch.where(self._mask > bound, latents.index_select(0, self._at), kept)
        latents.index_copy_(0, self._at, own)


def _table(row: Row) -> StepTable:
    assert row.sampler.table is not None
    return row.sampler.table


def _padded(state: Tensor, size: int) -> Tensor:
    """(1 + r, C, h, w) with zeros behind, or without what a batch had before for others; (size, C, h, w)."""
    missing = size - len(state)
    return torch.cat([state, state.new_zeros(missing, *state.shape[1:])]) if missing > 0 else state[:size]
