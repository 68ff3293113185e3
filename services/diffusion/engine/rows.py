"""One picture on its way: its own scheduler, generator, prompt and controls. For the device thread."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fanlight.errors import InvalidField
from services.diffusion.engine.beginning import begin, first_step, latent_shape
from services.diffusion.engine.controls import ControlRow
from services.diffusion.generation import Generation
from services.diffusion.models.loading import Checkpoint
from services.diffusion.prompt.encode import Conditioning
from services.diffusion.schedulers.make import make_scheduler


class Row:
    """Latents (1, C, H/f, W/f) and what leads them from noise to a picture; changed by `advance` alone."""

    def __init__(
        self,
        generation: Generation,
        checkpoint: Checkpoint,
        prompts: tuple[Conditioning, Conditioning | None],
        controls: list[ControlRow],
    ) -> None:
        """`prompts`: the prompt, and with guidance the negative one."""
        self.generation = generation
        self.checkpoint = checkpoint
        self.wanted, self.unwanted = prompts
        self.controls = controls
        self._scheduler = _scheduler(generation, checkpoint)
        self._timesteps = _timesteps(self._scheduler, generation)
        generator = torch.Generator("cpu").manual_seed(generation.seed)
        self._extras = _step_extras(self._scheduler, generator, generation.eta)
        self.index = 0
        beginning = begin(generation, checkpoint, self._scheduler, self._timesteps[0], generator)
        self.latents = beginning.latents
        # What the UNet takes beside the latents, (1, more channels, H/f, W/f).
        self.beside = beginning.beside
        self._kept = beginning.kept
        # The picture that the last evaluation was heading for; a preview shows it.
        self.expected = self.latents

    @property
    def evaluations(self) -> int:
        """How often the model is asked in all: some schedulers ask twice a step."""
        return len(self._timesteps)

    @property
    def is_finished(self) -> bool:
        return self.index == self.evaluations

    @property
    def timestep(self) -> Tensor:
        return self._timesteps[self.index]

    def model_input(self) -> Tensor:
        """The latents as the model wants them at this step; once before every `advance`."""
        scaled: Tensor = self._scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def control_scales(self) -> list[float]:
        return [control.scale_at(self.index, self.evaluations) for control in self.controls]

    def advance(self, prediction: Tensor) -> None:
        """Take one step with what the model said, of the latents' shape."""
        step = self._scheduler.step(prediction, self.timestep, self.latents, **self._extras)
        self.latents = step.prev_sample
        self.expected = _expected(self._scheduler, step)
        self.index += 1
        if self._kept is not None:
            upcoming = None if self.is_finished else self.timestep
            self.latents = self._kept.put_back(self.latents, self._scheduler, upcoming)


def _scheduler(generation: Generation, checkpoint: Checkpoint) -> Any:
    config: Mapping[str, Any] = checkpoint.scheduler_config
    try:
        return make_scheduler(
            generation,
            config,
            shape=latent_shape(generation, checkpoint),
            dtype=checkpoint.dtype,
            device=checkpoint.device,
        )
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InvalidField(f"{generation.scheduler} cannot run {generation.steps} steps", field="steps") from error
    except TypeError as error:
        raise InvalidField(
            f"is {generation.scheduler}, which is for checkpoints of another kind than {generation.checkpoint.id}",
            field="scheduler",
        ) from error


def _timesteps(scheduler: Any, generation: Generation) -> Tensor:
    """Those that are evaluated: img2img leaves the first ones out."""
    first = first_step(generation) * scheduler.order
    if generation.start is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps: Tensor = scheduler.timesteps[first:]
    return timesteps


def _step_extras(scheduler: Any, generator: torch.Generator, eta: float) -> dict[str, Any]:
    """What this scheduler's `step` takes besides the usual."""
    takes = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in takes}


def _expected(scheduler: Any, step: Any) -> Tensor:
    """The finished latents as this step expects them, where the scheduler tells; else the present ones."""
    told = getattr(step, "pred_original_sample", None)
    if told is None:
        told = getattr(step, "denoised", None)
    if told is None and str(scheduler.config.get("algorithm_type", "")).endswith("dpmsolver++"):
        told = scheduler.model_outputs[-1]
    expected: Tensor = step.prev_sample if told is None else told
    return expected
