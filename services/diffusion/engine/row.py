"""One image as a row of the batch: its latents, scheduler, generator, conditioning and controls. For the device thread.

Random numbers are drawn in the order of diffusers' pipelines, even unused ones: a seed gives the same image there.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from fanlight.contract.masks import NOISE, NOTHING, ORIGINAL
from fanlight.errors import FanlightError, InvalidField
from services.diffusion.engine.conditioning import RowConditioning, StepConditioning
from services.diffusion.engine.controls import ControlRow
from services.diffusion.engine.generation import Generation, Start
from services.diffusion.engine.vae import ModelGaveNaN, encode, require_encoder, to_mask, to_vae
from services.diffusion.models.faults import CONTENT_ERRORS, UnusableModel, blames, fault_of, is_of_device, part_of
from services.diffusion.models.model_cache import Checkpoint
from services.diffusion.schedulers import make_scheduler, scheduler_class

# Above this mean cosine A1111 takes two noises for the same.
_SAME_NOISE_COSINE = 0.9995
# Columns whose angle has a smaller sine are mixed linearly.
_SINE_MIN = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InpaintState:
    """What inpainting with an ordinary UNet keeps: after every step the noised original goes where the mask is 0.

    `original`, `noise`: latents (1, C, h, w); `mask`: (1, 1, h, w), 1 is generated again, 0 is kept, and a value
    between is kept until that part of the steps is left (differential diffusion, Levin and Fried 2023).
    """

    original: Tensor
    noise: Tensor
    mask: Tensor

    def put_back(self, latents: Tensor, scheduler: Any, timestep: Tensor | None, *, done: float) -> Tensor:
        """Latents (1, C, h, w) with the original where the mask is 0, as diffusers' inpaint pipeline does.

        `timestep`: the next one, (); None after the last step. `done`: which part of the steps, above 0 to 1.
        """
        original = self.original
        if timestep is not None:
            original = scheduler.add_noise(original, self.noise, timestep.reshape(1))
        free = (self.mask > 1 - done).to(latents.dtype)
        return (1 - free) * original + free * latents


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialLatents:
    """`latents`: (1, C, h, w), of the scheduler's first noise level."""

    latents: Tensor
    inpaint: InpaintState | None = None
    # What a UNet made for inpainting takes beside the latents: mask and masked image, (1, 5, h, w).
    extra_channels: Tensor | None = None


class Row:
    """Latents (1, C, H/f, W/f) and all that turns them from noise into an image; changed by `advance` alone."""

    def __init__(
        self,
        generation: Generation,
        checkpoint: Checkpoint,
        conditioning: RowConditioning,
        controls: list[ControlRow],
        *,
        warnings: tuple[str, ...] = (),
    ) -> None:
        """`warnings`: what was done otherwise to begin it, in sentences."""
        self.generation = generation
        self.warnings = warnings
        self.checkpoint = checkpoint
        self.conditioning = conditioning
        self.controls = controls
        with _scheduler_faults(generation, checkpoint):
            self._scheduler = _scheduler(generation, checkpoint)
            self._timesteps = _timesteps(self._scheduler, generation)
        generator = torch.Generator("cpu").manual_seed(generation.seed)
        self._step_arguments = _step_arguments(self._scheduler, generator, generation.eta)
        self.index = 0
        initial = initial_latents(generation, checkpoint, self._scheduler, self._timesteps[0], generator)
        self.latents = initial.latents
        # What the UNet takes beside the latents, (1, more channels, H/f, W/f).
        self.extra_channels = initial.extra_channels
        self._inpaint = initial.inpaint
        # The finished latents as the last evaluation predicts them; a preview shows them.
        self.predicted_original = self.latents

    @property
    def evaluations(self) -> int:
        """How often the model is evaluated in all: some schedulers need two evaluations a step."""
        return len(self._timesteps)

    @property
    def step(self) -> int:
        """The step that the current evaluation belongs to, from 1, as prompts that change count them.

        As in A1111 the first one that runs is 1, also with an image to start from. Other than there both evaluations of
        a second-order scheduler's step are of one step.
        """
        order: int = self._scheduler.order
        return min(self.index // max(1, order) + 1, self.generation.steps)

    def step_conditioning(self) -> StepConditioning:
        return self.conditioning.at(self.step)

    @property
    def is_finished(self) -> bool:
        return self.index == self.evaluations

    @property
    def timestep(self) -> Tensor:
        """The current one of the (T,) timesteps, a scalar of shape (): 0 to 999 in most schedulers."""
        return self._timesteps[self.index]

    def model_input(self) -> Tensor:
        """The latents (1, C, H/f, W/f), scaled as the model takes them at this step; call once before `advance`."""
        with _scheduler_faults(self.generation, self.checkpoint):
            scaled: Tensor = self._scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def control_scales(self) -> list[float]:
        return [control.scale_at(self.index, self.evaluations) for control in self.controls]

    def advance(self, prediction: Tensor) -> None:
        """Take one step with the model's prediction (1, C, H/f, W/f): noise, velocity or sample, as it was trained.

        InvalidField where the scheduler cannot; UnusableModel for a prediction of another shape.
        """
        if prediction.shape != self.latents.shape:
            entry = self.checkpoint.entry
            raise UnusableModel(f"checkpoint {entry.id} predicts {tuple(prediction.shape)} numbers").of_part(
                part_of(entry)
            )
        with _scheduler_faults(self.generation, self.checkpoint):
            step = self._scheduler.step(prediction, self.timestep, self.latents, **self._step_arguments)
            self.latents = step.prev_sample
            self.predicted_original = _predicted_original(self._scheduler, step)
            self.index += 1
            if self._inpaint is not None:
                upcoming = None if self.is_finished else self.timestep
                self.latents = self._inpaint.put_back(
                    self.latents, self._scheduler, upcoming, done=self.index / self.evaluations
                )


def are_finite(rows: Sequence[Row]) -> list[bool]:
    """Whether all numbers of each row's latents are finite; waits for the device once, not once a row."""
    if not rows:
        return []
    finite: list[bool] = torch.stack([torch.isfinite(row.latents).all() for row in rows]).tolist()
    return finite


def nan_error(row: Row) -> ModelGaveNaN:
    """Reported instead of a black image."""
    return ModelGaveNaN(f"the model gave NaN at step {row.index} of {row.evaluations}; try another scheduler or size")


def _scheduler(generation: Generation, checkpoint: Checkpoint) -> Any:
    config: Mapping[str, Any] = checkpoint.scheduler_config
    try:
        return make_scheduler(
            generation.scheduler,
            config,
            noise_schedule=generation.noise_schedule,
            steps=generation.steps,
            seed=generation.seed,
            shape=latent_shape(generation, checkpoint),
            dtype=checkpoint.dtype,
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
def _scheduler_faults(generation: Generation, checkpoint: Checkpoint) -> Iterator[None]:
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


def _step_arguments(scheduler: Any, generator: torch.Generator, eta: float) -> dict[str, Any]:
    """The optional arguments that this scheduler's `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in takes}


def _predicted_original(scheduler: Any, step: Any) -> Tensor:
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


def initial_latents(
    generation: Generation, checkpoint: Checkpoint, scheduler: Any, timestep: Tensor, generator: torch.Generator
) -> InitialLatents:
    """Latents (1, C, h, w): pure noise, or those of the start image with noise on them, as in diffusers' pipelines.

    `timestep`: the first one that is evaluated, a scalar.
    """
    if generation.start is None:
        noise = _first_noise(generation, checkpoint, generator)
        return InitialLatents(latents=noise * scheduler.init_noise_sigma)
    if generation.start.mask is None:
        original = _encode(generation, checkpoint, to_vae(generation.start.image), generator)
        noise = _first_noise(generation, checkpoint, generator, after_encoding=True)
        return InitialLatents(latents=scheduler.add_noise(original, noise, timestep.reshape(1)))
    return _inpainting(generation, generation.start, checkpoint, scheduler, timestep, generator)


def _inpainting(
    generation: Generation,
    start: Start,
    checkpoint: Checkpoint,
    scheduler: Any,
    timestep: Tensor,
    generator: torch.Generator,
) -> InitialLatents:
    assert start.mask is not None
    pixels, mask = to_vae(start.image), to_mask(start.mask)
    is_inpainting_unet = checkpoint.entry.is_inpainting
    # As in A1111, what a fill lays under the mask shows through even at full strength.
    is_all_noise = start.strength == 1.0 and start.fill == ORIGINAL
    needs_original = not (is_inpainting_unet and is_all_noise)
    original = _encode(generation, checkpoint, pixels, generator) if needs_original else None
    noise = _first_noise(generation, checkpoint, generator, after_encoding=needs_original)
    # A latent is generated again if any of its pixels is: nothing of the old image is left under the mask.
    small = adaptive_max_pool2d(mask, noise.shape[-2:]).to(noise.device, noise.dtype)
    if is_all_noise:
        latents = noise * scheduler.init_noise_sigma
    else:
        assert original is not None
        latents = scheduler.add_noise(_under_mask(start.fill, original, noise, small), noise, timestep.reshape(1))
    if is_inpainting_unet:
        masked = _encode(generation, checkpoint, pixels * (mask < 0.5), generator)
        return InitialLatents(latents=latents, extra_channels=torch.cat([small.round(), masked], dim=1))
    # The pipelines encode the masked image for every UNet; an ordinary one does not use it, but its draw counts.
    _draw(generation, checkpoint, generator)
    assert original is not None
    return InitialLatents(latents=latents, inpaint=InpaintState(original=original, noise=noise, mask=small))


def _under_mask(fill: str, original: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Latents (1, C, h, w) that the first noise goes on; as A1111's latent noise and latent nothing."""
    if fill == NOISE:
        return original * (1 - mask) + noise * mask
    return original * (1 - mask) if fill == NOTHING else original


def _encode(generation: Generation, checkpoint: Checkpoint, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """As `encode`, from (1, 3, H, W) to (1, C, h, w); errors of the VAE name its model."""
    require_encoder(checkpoint)
    with blames(generation.vae_entry):
        return encode(checkpoint, pixels, generator)


def latent_shape(generation: Generation, checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """(1, C, H/f, W/f), C and f from the VAE's config."""
    shape = checkpoint.entry.shape
    factor = shape.latent_factor
    return 1, shape.latent_channels, generation.height_px // factor, generation.width_px // factor


def _first_noise(
    generation: Generation, checkpoint: Checkpoint, generator: torch.Generator, *, after_encoding: bool = False
) -> Tensor:
    """The seed's noise, mixed with the variation seed's; later draws are from the seed alone, as in A1111.

    `after_encoding`: the generator has drawn an image's latents before. The variation seed's generator draws them too,
    so that at strength 1 the image begins as the variation seed's own.
    """
    noise = _draw(generation, checkpoint, generator)
    if generation.variation_seed is None:
        return noise.to(checkpoint.device)
    other = torch.Generator("cpu").manual_seed(generation.variation_seed)
    if after_encoding:
        torch.randn(latent_shape(generation, checkpoint), generator=other, dtype=checkpoint.vae.dtype)
    mixed = slerp(noise, _draw(generation, checkpoint, other), generation.variation_strength)
    return mixed.to(checkpoint.device)


def slerp(low: Tensor, high: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of noise (1, C, H, W), from `low` at 0 to `high` at 1, with an angle for each column.

    As A1111's modules/rng.py, and like there linear where the two are the same; also for columns of opposite or equal
    directions, where A1111 divides by zero.
    """
    low_, high_ = low.float(), high.float()
    low_unit = low_ / torch.linalg.vector_norm(low_, dim=-2, keepdim=True)
    high_unit = high_ / torch.linalg.vector_norm(high_, dim=-2, keepdim=True)
    cosine = (low_unit * high_unit).sum(-2, keepdim=True)
    linear = torch.lerp(low_, high_, weight)
    if float(cosine.mean()) > _SAME_NOISE_COSINE:
        return linear.to(low.dtype)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    mixed = torch.sin((1 - weight) * angle) / sine * low_ + torch.sin(weight * angle) / sine * high_
    return torch.where(sine > _SINE_MIN, mixed, linear).to(low.dtype)


def _draw(generation: Generation, checkpoint: Checkpoint, generator: torch.Generator) -> Tensor:
    """Noise of the latents' shape from the image's own CPU generator: a seed means the same on every device."""
    return torch.randn(latent_shape(generation, checkpoint), generator=generator, dtype=checkpoint.dtype)
