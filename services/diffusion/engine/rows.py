"""One picture on its way: its own scheduler, generator, prompt and controls. For the device thread."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from services.diffusion.generation import Control, Generation
from services.diffusion.models.loading import Checkpoint
from services.diffusion.pictures.control import to_condition
from services.diffusion.prompt.encode import Conditioning, encode_one, encode_pair
from services.diffusion.schedulers.make import make_scheduler
from services.kernel.errors import InvalidField


class ControlRow:
    """One ControlNet's part in one picture."""

    def __init__(self, control: Control, net: Any, checkpoint: Checkpoint) -> None:
        self.net = net
        self.condition = to_condition(control.image).to(checkpoint.device, checkpoint.dtype)
        self._control = control

    def scale_at(self, index: int, count: int) -> float:
        """How strongly it conditions evaluation `index` of `count`; 0 outside of its start and end."""
        control = self._control
        if index / count < control.start or (index + 1) / count > control.end:
            return 0.0
        return control.scale


class Row:
    """Latents (1, C, H/f, W/f) and what leads them from noise to a picture; changed by `advance` alone."""

    def __init__(self, generation: Generation, checkpoint: Checkpoint, nets: list[Any]) -> None:
        self.generation = generation
        self.checkpoint = checkpoint
        self.wanted, self.unwanted = _encode(generation, checkpoint)
        self.controls = [
            ControlRow(control, net, checkpoint) for control, net in zip(generation.controls, nets, strict=True)
        ]
        self._scheduler = _scheduler(generation, checkpoint)
        self._generator = torch.Generator("cpu").manual_seed(generation.seed)
        self._extras = _step_extras(self._scheduler, self._generator)
        self.index = 0
        self.latents = self._noise()
        # The picture that the last evaluation was heading for; a preview shows it.
        self.expected = self.latents

    @property
    def evaluations(self) -> int:
        """How often the model is asked in all: some schedulers ask twice a step."""
        return len(self._scheduler.timesteps)

    @property
    def is_finished(self) -> bool:
        return self.index == self.evaluations

    @property
    def timestep(self) -> Tensor:
        timestep: Tensor = self._scheduler.timesteps[self.index]
        return timestep

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

    def is_sound(self) -> bool:
        return bool(torch.isfinite(self.latents).all())

    def _noise(self) -> Tensor:
        """From the picture's own CPU generator, so that a seed means the same on every device."""
        entry = self.checkpoint.entry
        factor = entry.shape.latent_factor
        height, width = self.generation.height_px // factor, self.generation.width_px // factor
        shape = (1, entry.shape.latent_channels, height, width)
        noise = torch.randn(shape, generator=self._generator, dtype=self.checkpoint.dtype)
        scaled: Tensor = noise.to(self.checkpoint.device) * self._scheduler.init_noise_sigma
        return scaled


def _encode(generation: Generation, checkpoint: Checkpoint) -> tuple[Conditioning, Conditioning | None]:
    if generation.is_guided:
        return encode_pair(checkpoint, generation.prompt, generation.negative_prompt)
    return encode_one(checkpoint, generation.prompt), None


def _scheduler(generation: Generation, checkpoint: Checkpoint) -> Any:
    config: Mapping[str, Any] = checkpoint.scheduler_config
    try:
        return make_scheduler(generation.scheduler, config, steps=generation.steps, device=checkpoint.device)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InvalidField(f"{generation.scheduler} cannot run {generation.steps} steps", field="steps") from error


def _step_extras(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """What this scheduler's `step` takes besides the usual."""
    takes = inspect.signature(scheduler.step).parameters
    return {"generator": generator} if "generator" in takes else {}


def _expected(scheduler: Any, step: Any) -> Tensor:
    """The finished latents as this step expects them, where the scheduler tells; else the present ones."""
    told = getattr(step, "pred_original_sample", None)
    if told is None and str(scheduler.config.get("algorithm_type", "")).endswith("dpmsolver++"):
        told = scheduler.model_outputs[-1]
    expected: Tensor = step.prev_sample if told is None else told
    return expected
