"""What a scheduler does to the latents, step by step, as tables of numbers: known before the first step.

diffusers' schedulers are linear: each step's latents are a sum of the latents, the model's prediction, noise and what
the scheduler remembers, each times a number that depends on the step alone. Those numbers are found by running the
scheduler itself once on unit vectors; afterwards all rows of a batch take a step in one operation, whatever their
schedulers, and nothing on the device has to be read. Schedulers that clip or threshold have no table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

Numbers = NDArray[np.float32]
# Unit vectors for the latents, the prediction and the noise, and for so many things that a scheduler remembers.
_GIVEN, _REMEMBERED_LIMIT = 3, 12
_LATENTS, _PREDICTION, _NOISE = range(_GIVEN)
_UNITS = _GIVEN + _REMEMBERED_LIMIT
# Beside them, numbers of all sizes that show whether sums of units are all there is to it.
_CHECKS = 6
_LARGEST = 30.0
_TOLERANCE = 1e-4


class NotLinear(Exception):
    """The scheduler does something else than to add multiples."""


class Draw(NamedTuple):
    """Noise that one step takes: of the generator, in this number type; or of the Brownian path between two levels."""

    dtype: torch.dtype = torch.float32
    sigmas: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTable:
    """For T evaluations, of which each one changes the latents and R remembered tensors of their shape.

    `matrices`: (T, 1 + R + 1, 1 + R + 2): to the latents, what is remembered, and the finished latents as this step
    predicts them; from the latents, what is remembered, the prediction and the noise.
    """

    # (T,), as the model takes them.
    timesteps: Numbers
    # (T,): the model's input is the latents times this.
    scales: Numbers
    matrices: Numbers
    # (T, 2): how much of an original and of noise there is in the latents after each step; the original alone at last.
    levels: Numbers
    draws: tuple[Draw | None, ...]
    order: int
    # What the first noise is multiplied by: a number or a scalar tensor.
    init_noise_sigma: Any

    @property
    def remembered(self) -> int:
        """R."""
        remembered: int = self.matrices.shape[1] - 2
        return remembered

    @property
    def evaluations(self) -> int:
        """T."""
        return len(self.timesteps)


def step_table(
    scheduler: Any,
    timesteps: Tensor,
    arguments: Mapping[str, Any],
    predicted_original: Callable[[Any, Any], Tensor],
    drawn_by: Any = None,
    dtype: torch.dtype = torch.float32,
) -> StepTable:
    """`scheduler`: fresh, and of no use afterwards. `timesteps`: (T,), those that are evaluated.

    `arguments`: of its `step`. `predicted_original`: of a scheduler and what its step gave. `drawn_by`: another fresh
    one, where predictions are of another `dtype` than float32, which noise may be drawn in. NotLinear, or what the
    scheduler raises.
    """
    init_noise_sigma = scheduler.init_noise_sigma
    sums = _Sums(_units())
    probed = [*_probed(scheduler, timesteps, arguments, predicted_original, sums)]
    found = sums.found()
    steps = [probe.solved(found) for probe in probed]
    draws = tuple(step.draw for step in steps)
    if drawn_by is not None and any(draws):
        draws = _draws(drawn_by, timesteps, arguments, dtype)
    return StepTable(
        timesteps=timesteps.numpy().astype(np.float32),
        scales=np.array([step.scale for step in steps], dtype=np.float32),
        matrices=_matrices(steps),
        levels=np.array([step.levels for step in steps], dtype=np.float32),
        draws=draws,
        order=scheduler.order,
        init_noise_sigma=init_noise_sigma,
    )


# Where a scheduler keeps a tensor: an attribute's name, and for a list the place in it.
_Path = tuple[str, int]
_WHOLE = -1


class _Step(NamedTuple):
    """One step as sums of units: each vector is (_UNITS,), over latents, prediction, noise and what `taken` names."""

    scale: float
    latents: Numbers
    predicted: Numbers
    taken: list[_Path]
    kept: dict[_Path, Numbers]
    levels: tuple[float, float]
    draw: Draw | None


class _Probe(NamedTuple):
    """A `_Step` whose vectors are numbers of `_Sums`."""

    scale: int
    latents: int
    predicted: int
    taken: list[_Path]
    kept: dict[_Path, int]
    # None after the last step.
    levels: int | None
    draw: Draw | None

    def solved(self, found: Numbers) -> _Step:
        """`found`: (k, _UNITS)."""
        levels = (1.0, 0.0) if self.levels is None else found[self.levels][[_LATENTS, _NOISE]].tolist()
        return _Step(
            scale=float(found[self.scale, _LATENTS]),
            latents=found[self.latents],
            predicted=found[self.predicted],
            taken=self.taken,
            kept={path: found[number] for path, number in self.kept.items()},
            levels=(levels[0], levels[1]),
            draw=self.draw,
        )


class _Sums:
    """Tensors that a scheduler made of the units, each by its number; solved together."""

    def __init__(self, units: Tensor) -> None:
        self.units = units
        self._made: list[Tensor] = []

    def add(self, made: Tensor) -> int:
        self._made.append(made.to(torch.float64, copy=True).reshape(-1))
        return len(self._made) - 1

    def found(self) -> Numbers:
        """The numbers (k, _UNITS) by which the units add up to each of the k. NotLinear where they do not."""
        made: NDArray[np.float64] = torch.stack(self._made).numpy()
        numbers, checks = made[:, :_UNITS], made[:, _UNITS:]
        units = self.units.reshape(_UNITS, -1)[:, _UNITS:].double().numpy()
        # Written so that NaN is refused too.
        if not (np.abs(numbers @ units - checks) <= _TOLERANCE * (np.abs(numbers) @ np.abs(units))).all():
            raise NotLinear
        return numbers.astype(np.float32)


def _probed(
    scheduler: Any,
    timesteps: Tensor,
    arguments: Mapping[str, Any],
    predicted_original: Callable[[Any, Any], Tensor],
    sums: _Sums,
) -> Iterator[_Probe]:
    units = sums.units
    noise = _Noise(units[_NOISE])
    if getattr(scheduler, "noise_sampler", None) is not None:
        scheduler.noise_sampler = noise.between
    for number, timestep in enumerate(timesteps):
        taken = [path for path, _ in _remembered(scheduler)]
        if len(taken) > _REMEMBERED_LIMIT:
            raise NotLinear
        for slot, path in enumerate(taken):
            _replace(scheduler, path, units[_GIVEN + slot].clone())
        scale = sums.add(scheduler.scale_model_input(units[_LATENTS].clone(), timestep))
        with noise:
            step = scheduler.step(units[_PREDICTION].clone(), timestep, units[_LATENTS].clone(), **arguments)
        yield _Probe(
            scale=scale,
            latents=sums.add(step.prev_sample),
            predicted=sums.add(predicted_original(scheduler, step)),
            taken=taken,
            kept={path: sums.add(tensor) for path, tensor in _remembered(scheduler)},
            levels=_levels(scheduler, timesteps[number + 1 : number + 2], sums),
            draw=noise.taken(),
        )


def _units() -> Tensor:
    """(_UNITS, 1, 1, 1, _UNITS + _CHECKS): unit vectors, and behind them the numbers that check."""
    generator = torch.Generator("cpu").manual_seed(0)
    checks = torch.randn(_UNITS, _CHECKS, generator=generator) * torch.logspace(-1, 0, _CHECKS) * _LARGEST
    return torch.cat([torch.eye(_UNITS), checks], dim=1).reshape(_UNITS, 1, 1, 1, -1)


def _remembered(scheduler: Any) -> Iterator[tuple[_Path, Tensor]]:
    """The tensors of the latents' shape that it keeps from step to step."""
    for name, value in sorted(vars(scheduler).items()):
        for place, each in enumerate(value) if isinstance(value, list) else [(_WHOLE, value)]:
            if isinstance(each, Tensor) and each.dim() == 4:
                yield (name, place), each


def _replace(scheduler: Any, path: _Path, tensor: Tensor) -> None:
    name, place = path
    if place == _WHOLE:
        setattr(scheduler, name, tensor)
    else:
        getattr(scheduler, name)[place] = tensor


def _levels(scheduler: Any, upcoming: Tensor, sums: _Sums) -> int | None:
    """`upcoming`: the next timestep, (1,); (0,) after the last one."""
    if not len(upcoming):
        return None
    return sums.add(scheduler.add_noise(sums.units[_LATENTS].clone(), sums.units[_NOISE].clone(), upcoming))


class _Noise(TorchFunctionMode):
    """Gives a scheduler that draws noise, in this thread, a unit vector in its place, and keeps what it asked for."""

    def __init__(self, unit: Tensor) -> None:
        super().__init__()
        self._unit = unit
        self._asked: list[Draw] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is not torch.randn:
            return func(*args, **options)
        dtype = options.get("dtype") or torch.float32
        self._asked.append(Draw(dtype=dtype))
        return self._unit.to(dtype)

    def between(self, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
        """In the place of a BrownianNoise."""
        self._asked.append(Draw(sigmas=(float(sigma), float(next_sigma))))
        return self._unit.clone()

    def taken(self) -> Draw | None:
        """What was asked for since the last call. NotLinear where that is more than one draw."""
        asked, self._asked = self._asked, []
        if len(asked) > 1:
            raise NotLinear
        return asked[0] if asked else None


def _draws(
    scheduler: Any, timesteps: Tensor, arguments: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Draw | None, ...]:
    """What noise a run of predictions of this type draws."""
    like = torch.zeros(1, 1, 1, 1, dtype=dtype)
    noise = _Noise(like.float())
    if getattr(scheduler, "noise_sampler", None) is not None:
        scheduler.noise_sampler = noise.between
    latents, draws = like, list[Draw | None]()
    for timestep in timesteps:
        scheduler.scale_model_input(latents, timestep)
        with noise:
            latents = scheduler.step(like, timestep, latents, **arguments).prev_sample
        draws.append(noise.taken())
    return tuple(draws)


def _matrices(steps: Sequence[_Step]) -> Numbers:
    """As StepTable has them, with those remembered tensors alone that a later step takes."""
    live = _live(steps)
    size = 1 + len(live)
    matrices = np.zeros((len(steps), size + 1, size + 2), dtype=np.float32)
    for matrix, step in zip(matrices, steps, strict=True):
        sources = {_LATENTS: 0, _PREDICTION: size, _NOISE: size + 1}
        sources |= {_GIVEN + slot: 1 + live.index(path) for slot, path in enumerate(step.taken) if path in live}
        targets = {0: step.latents, size: step.predicted}
        targets |= {1 + live.index(path): numbers for path, numbers in step.kept.items() if path in live}
        for target, numbers in targets.items():
            for unit, source in sources.items():
                matrix[target, source] = numbers[unit]
    return matrices


def _live(steps: Sequence[_Step]) -> list[_Path]:
    """The remembered tensors that latents are made of later."""
    live: set[_Path] = set()
    while True:
        found = set(live)
        for step in steps:
            made = [step.latents, step.predicted, *(step.kept[path] for path in live if path in step.kept)]
            found |= {path for slot, path in enumerate(step.taken) if any(each[_GIVEN + slot] for each in made)}
        if found == live:
            return sorted(live)
        live = found
