"""One image as a row of the batch: its latents, scheduler, generator, conditioning and controls. For the device thread.

Random numbers are drawn in the order of diffusers' pipelines, even unused ones: a seed gives the same image there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from fanlight.contract.masks import NOISE, NOTHING, ORIGINAL
from fanlight.errors import FanlightError
from services.diffusion.engine.conditioning import RowConditioning, StepConditioning
from services.diffusion.engine.controls import ControlRow
from services.diffusion.engine.generation import Generation, Start
from services.diffusion.engine.sampler import Sampler, open_sampler, predicted_original, scheduler_faults
from services.diffusion.engine.vae import ModelGaveNaN, encode, require_encoder, to_mask, to_vae
from services.diffusion.models.faults import UnusableModel, blames, part_of
from services.diffusion.models.model_cache import Checkpoint

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
    """Latents (1, C, H/f, W/f) and all that turns them from noise into an image.

    A batch changes it, see row_batch.py; where its scheduler has no table, `advance`.
    """

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
        # Of the latents.
        self.shape = latent_shape(generation, checkpoint)
        generator = torch.Generator("cpu").manual_seed(generation.seed)
        with scheduler_faults(generation, checkpoint):
            self.sampler = open_sampler(generation, checkpoint, generator, self.shape)
        self.index = 0
        initial = initial_latents(generation, checkpoint, self.sampler, generator)
        # What the UNet takes beside the latents, (1, more channels, H/f, W/f).
        self.extra_channels = initial.extra_channels
        self.inpaint = initial.inpaint
        # The batch that was made of it last; None before the first one.
        self.batched: BatchPlace | None = None
        # Its place in the tensor that holds its latents; None before the first one and without a table.
        self.held: HeldRow | None = None
        self._latents = initial.latents
        self._predicted = initial.latents

    @property
    def evaluations(self) -> int:
        """How often the model is evaluated in all: some schedulers need two evaluations a step."""
        return self.sampler.evaluations

    @property
    def step(self) -> int:
        """The step that the current evaluation belongs to, from 1, as prompts that change count them.

        As in A1111 the first one that runs is 1, also with an image to start from. Other than there both evaluations of
        a second-order scheduler's step are of one step.
        """
        return min(self.index // max(1, self.sampler.order) + 1, self.generation.steps)

    def step_conditioning(self) -> StepConditioning:
        return self.conditioning.at(self.step)

    @property
    def is_finished(self) -> bool:
        return self.index == self.evaluations

    @property
    def latents(self) -> Tensor:
        return self._latents if self.held is None else self.held.latents()

    @latents.setter
    def latents(self, latents: Tensor) -> None:
        """What its scheduler remembers of the steps before is forgotten."""
        self.held = None
        self._latents = latents

    @property
    def predicted_original(self) -> Tensor:
        """The finished latents as the last evaluation predicts them; a preview shows them."""
        return self._predicted if self.held is None else self.held.predicted()

    def state(self) -> Tensor:
        """The latents and what a table's steps remember, (1 + R, C, h, w) in float32."""
        if self.held is not None:
            return self.held.state()
        table = self.sampler.table
        assert table is not None
        return torch.cat([self._latents.float(), self._latents.new_zeros(table.remembered, *self.shape[1:]).float()])

    def timestep(self) -> Tensor:
        """The current one of a scheduler without a table, a scalar of shape (): 0 to 999 in most."""
        assert self.sampler.timesteps is not None
        return self.sampler.timesteps[self.index]

    def model_input(self) -> Tensor:
        """The latents (1, C, H/f, W/f), scaled as the model takes them at this step; call once before `advance`."""
        with scheduler_faults(self.generation, self.checkpoint):
            scaled: Tensor = self.sampler.scheduler.scale_model_input(self._latents, self.timestep())
        return scaled

    def control_scales(self) -> list[float]:
        return [control.scale_at(self.index, self.evaluations) for control in self.controls]

    def advance(self, prediction: Tensor) -> None:
        """Take one step with the model's prediction (1, C, H/f, W/f): noise, velocity or sample, as it was trained.

        InvalidField where the scheduler cannot.
        """
        scheduler = self.sampler.scheduler
        with scheduler_faults(self.generation, self.checkpoint):
            step = scheduler.step(prediction, self.timestep(), self._latents, **self.sampler.arguments)
            self._latents = step.prev_sample
            self._predicted = predicted_original(scheduler, step)
            self.index += 1
            if self.inpaint is not None:
                upcoming = None if self.is_finished else self.timestep()
                self._latents = self.inpaint.put_back(
                    self._latents, scheduler, upcoming, done=self.index / self.evaluations
                )


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlace:
    """A row's number in a RowBatch, which imports this module."""

    batch: object
    number: int


class HeldRow(Protocol):
    """A row's place in a batch that holds its latents."""

    def latents(self) -> Tensor: ...

    def predicted(self) -> Tensor: ...

    def state(self) -> Tensor: ...


def misfit(row: Row, prediction: Tensor) -> FanlightError | None:
    """UnusableModel for a prediction of another shape than the row's latents."""
    if prediction.shape == row.shape:
        return None
    entry = row.checkpoint.entry
    return UnusableModel(f"checkpoint {entry.id} predicts {tuple(prediction.shape)} numbers").of_part(part_of(entry))


def are_finite(rows: Sequence[Row]) -> list[bool]:
    """Whether all numbers of each row's latents are finite; waits for the device once, not once a row."""
    if not rows:
        return []
    finite: list[bool] = torch.stack([torch.isfinite(row.latents).all() for row in rows]).tolist()
    return finite


def nan_error(row: Row) -> ModelGaveNaN:
    """Reported instead of a black image."""
    return ModelGaveNaN(f"the model gave NaN at step {row.index} of {row.evaluations}; try another scheduler or size")


def initial_latents(
    generation: Generation, checkpoint: Checkpoint, sampler: Sampler, generator: torch.Generator
) -> InitialLatents:
    """Latents (1, C, h, w): pure noise, or those of the start image with noise on them, as in diffusers' pipelines."""
    if generation.start is None:
        noise = _first_noise(generation, checkpoint, generator)
        return InitialLatents(latents=noise * sampler.init_noise_sigma)
    if generation.start.mask is None:
        original = _encode(generation, checkpoint, to_vae(generation.start.image), generator)
        noise = _first_noise(generation, checkpoint, generator, after_encoding=True)
        return InitialLatents(latents=sampler.noised(original, noise))
    return _inpainting(generation, generation.start, checkpoint, sampler, generator)


def _inpainting(
    generation: Generation,
    start: Start,
    checkpoint: Checkpoint,
    sampler: Sampler,
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
        latents = noise * sampler.init_noise_sigma
    else:
        assert original is not None
        latents = sampler.noised(_under_mask(start.fill, original, noise, small), noise)
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
