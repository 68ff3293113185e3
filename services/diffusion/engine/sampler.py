"""How one image's latents go from step to step: by its scheduler's table, else by the scheduler itself.

For the device thread.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fanlight.contract.schedulers import SCHEDULERS
from fanlight.errors import FanlightError, InvalidField
from services.diffusion.engine.generation import Generation
from services.diffusion.engine.transfers import as_type
from services.diffusion.models.faults import CONTENT_ERRORS, fault_of, is_of_device
from services.diffusion.models.model_cache import Checkpoint
from services.diffusion.schedulers import BrownianNoise, make_scheduler, scheduler_class
from services.diffusion.step_tables import NotLinear, StepTable, step_table

# So many tables are cached: of some kilobytes each.
TABLES_LIMIT = 128
_HOST = torch.device("cpu")
Shape = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampler:
    """Of one image. The scheduler's timesteps and numbers are the host's: no step reads them from the device."""

    # None for a scheduler that has none.
    table: StepTable | None
    # None where the table is enough.
    scheduler: Any
    # (T,), those that are evaluated; None without a scheduler.
    timesteps: Tensor | None
    # The optional arguments of the scheduler's `step`.
    arguments: Mapping[str, Any]
    generator: torch.Generator
    shape: Shape
    brownian: BrownianNoise | None

    @property
    def init_noise_sigma(self) -> Any:
        """What the first noise is multiplied by: a number or a scalar tensor."""
        return self.scheduler.init_noise_sigma if self.table is None else self.table.init_noise_sigma

    @property
    def order(self) -> int:
        order: int = self.scheduler.order if self.table is None else self.table.order
        return order

    @property
    def evaluations(self) -> int:
        if self.table is not None:
            return self.table.evaluations
        assert self.timesteps is not None
        return len(self.timesteps)

    def noised(self, original: Tensor, noise: Tensor) -> Tensor:
        """Latents (1, C, h, w) of the first noise level, of an image to start from."""
        assert self.timesteps is not None
        noised: Tensor = self.scheduler.add_noise(original, noise, self.timesteps[0].reshape(1))
        return noised

    def draw(self, index: int) -> Tensor | None:
        """The noise of step `index`, from 0, (1, C, h, w) in float32 on the host; to be called once, in order."""
        assert self.table is not None
        draw = self.table.draws[index]
        if draw is None:
            return None
        if draw.sigmas is not None:
            assert self.brownian is not None
            return self.brownian(*draw.sigmas)
        return as_type(torch.randn(self.shape, generator=self.generator, dtype=draw.dtype), torch.float32)


def open_sampler(generation: Generation, checkpoint: Checkpoint, generator: torch.Generator, shape: Shape) -> Sampler:
    """`generator`: what the image's noise is drawn from. InvalidField where the scheduler cannot run these steps."""
    key = _table_key(generation, checkpoint)
    make = partial(_scheduler, generation, checkpoint, shape)
    table = _TABLES.once(key, lambda: _new_table(generation, checkpoint, make(), make))
    scheduler = timesteps = None
    arguments: Mapping[str, Any] = {}
    if table is None or generation.start is not None:
        scheduler = make()
        timesteps = _timesteps(scheduler, generation)
        arguments = _step_arguments(scheduler, generator, generation.eta)
    return Sampler(
        table=table,
        scheduler=scheduler,
        timesteps=timesteps,
        arguments=arguments,
        generator=generator,
        shape=shape,
        brownian=_brownian(table, generation, shape),
    )


def _brownian(table: StepTable | None, generation: Generation, shape: Shape) -> BrownianNoise | None:
    if table is None or not any(draw is not None and draw.sigmas is not None for draw in table.draws):
        return None
    return BrownianNoise(seed=generation.seed, shape=shape, dtype=torch.float32, device=_HOST)


class _Tables:
    """Tables by what they follow from, or that there is none; the images of a job share one. For the device thread."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Hashable, StepTable | None] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], StepTable | None]) -> StepTable | None:
        """The table that is kept, or what `make` gives."""
        table = self._tables.pop(key) if key in self._tables else make()
        self._tables[key] = table
        if len(self._tables) > TABLES_LIMIT:
            self._tables.popitem(last=False)
        return table


_TABLES = _Tables()


def _table_key(generation: Generation, checkpoint: Checkpoint) -> Hashable:
    return (
        generation.scheduler,
        generation.noise_schedule,
        generation.steps,
        None if generation.start is None else first_step(generation),
        generation.eta if _takes_eta(generation.scheduler) else None,
        checkpoint.entry.recipe.is_sdxl,
        str(checkpoint.dtype),
        repr(sorted(checkpoint.scheduler_config.items(), key=lambda item: item[0])),
    )


def _new_table(generation: Generation, checkpoint: Checkpoint, scheduler: Any, make: Any) -> StepTable | None:
    """None where the scheduler has none; if it cannot run these steps, it says so itself when it takes them."""
    is_short = checkpoint.dtype is not torch.float32
    own = make(dtype=torch.float32) if is_short else scheduler
    timesteps = _timesteps(own, generation)
    arguments = _step_arguments(own, torch.Generator("cpu"), generation.eta)
    try:
        return step_table(
            own,
            timesteps,
            arguments,
            predicted_original,
            drawn_by=_begun(scheduler, generation) if is_short else None,
            dtype=checkpoint.dtype,
        )
    except (NotLinear, *CONTENT_ERRORS):
        return None


def _begun(scheduler: Any, generation: Generation) -> Any:
    _timesteps(scheduler, generation)
    return scheduler


def _scheduler(
    generation: Generation, checkpoint: Checkpoint, shape: Shape, *, dtype: torch.dtype | None = None
) -> Any:
    """`dtype`: another one than the checkpoint's."""
    config: Mapping[str, Any] = checkpoint.scheduler_config
    try:
        return make_scheduler(
            generation.scheduler,
            config,
            noise_schedule=generation.noise_schedule,
            steps=generation.steps,
            seed=generation.seed,
            shape=shape,
            dtype=dtype or checkpoint.dtype,
            device=checkpoint.device,
            is_sdxl=checkpoint.entry.recipe.is_sdxl,
        )
    except (ValueError, IndexError, ZeroDivisionError, TypeError) as error:
        if not _is_sound(config):
            raise
        if isinstance(error, TypeError):
            raise InvalidField(
                f"is {generation.scheduler}, which is for checkpoints of another kind than {generation.checkpoint.id}",
                field="scheduler",
            ) from error
        raise InvalidField(f"{generation.scheduler} cannot run {generation.steps} steps", field="steps") from error


@contextmanager
def scheduler_faults(generation: Generation, checkpoint: Checkpoint) -> Iterator[None]:
    """What a scheduler raises is the request's fault, which chose it; unless the checkpoint's config is damaged."""
    try:
        yield
    except FanlightError:
        raise
    except CONTENT_ERRORS as error:
        if is_of_device(error):
            raise
        if not _is_sound(checkpoint.scheduler_config):
            raise fault_of(checkpoint.entry, error) from error
        raise InvalidField(
            f"{generation.scheduler} fails for {generation.steps} steps on the noise schedule of "
            f"{generation.checkpoint.id}; choose another scheduler or number of steps",
            field="scheduler",
        ) from error


def _is_sound(config: Mapping[str, Any]) -> bool:
    """Whether the plainest scheduler can be made from a checkpoint's config, with finite numbers."""
    try:
        plain = scheduler_class("DDIMScheduler").from_config(config)
        plain.set_timesteps(10)
        latents = torch.zeros(1, 1, 1, 1)
        stepped = plain.step(latents, plain.timesteps[0], latents).prev_sample
        return bool(torch.isfinite(plain.alphas_cumprod).all() and torch.isfinite(stepped).all())
    except CONTENT_ERRORS:
        return False


def _timesteps(scheduler: Any, generation: Generation) -> Tensor:
    """Those that are evaluated, (evaluations,): img2img skips the first ones."""
    first = first_step(generation) * scheduler.order
    if generation.start is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps: Tensor = scheduler.timesteps[first:]
    return timesteps


@cache
def _takes_eta(name: str) -> bool:
    """Whether the scheduler of this name does; those that take its place for checkpoints of the EDM kind do not."""
    return "eta" in inspect.signature(scheduler_class(SCHEDULERS[name].cls).step).parameters


def _step_arguments(scheduler: Any, generator: torch.Generator, eta: float) -> dict[str, Any]:
    """The optional arguments that this scheduler's `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in takes}


def predicted_original(scheduler: Any, step: Any) -> Tensor:
    """The finished latents (1, C, h, w) as this step predicts them, where the scheduler has them; else the present."""
    original = getattr(step, "pred_original_sample", None)
    if original is None:
        original = getattr(step, "denoised", None)
    if original is None and str(scheduler.config.get("algorithm_type", "")).endswith("dpmsolver++"):
        original = scheduler.model_outputs[-1]
    predicted: Tensor = step.prev_sample if original is None else original
    return predicted


def first_step(generation: Generation) -> int:
    """How many steps img2img skips; at least one is left."""
    if generation.start is None:
        return 0
    count = min(int(generation.steps * generation.start.strength), generation.steps)
    assert count, "the contract refuses a strength that leaves no step"
    return generation.steps - count
