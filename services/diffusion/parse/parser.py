"""The whole request."""

from collections.abc import Callable
from dataclasses import dataclass

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Format, Generation, Safety
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.parse import fields
from services.diffusion.parse.controls import ControlReader, clip_skip_of, wants_hole
from services.diffusion.parse.pictures import Sources, digests_of_pictures, sources, start_of
from services.diffusion.parse.pipelines import HAS_MASK, STARTS_FROM_IMAGE, pipeline_of
from services.diffusion.parse.prompts import read_prompts
from services.diffusion.parse.sizes import asked_size, size_of_picture
from services.diffusion.pictures.fit import Resize
from services.diffusion.schedulers import names
from services.kernel.errors import FailedPrecondition
from services.kernel.pictures import PictureLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    catalogue: Catalogue
    pixels_limit: int
    picture_limits: PictureLimits
    # Seeds for requests without one.
    random_seed: Callable[[], int]
    # For requests that do not say.
    safety: Safety = Safety.OFF
    has_safety_checker: bool = False

    def parse(self, request: diffusion_pb2.GenerateRequest, *, alone: bool = False) -> Generation:
        """InvalidField, NotFound and TooLarge name the field. Decodes pictures, so it may take a while."""
        checkpoint = self.catalogue.checkpoint(request.model) if request.model else self.catalogue.default()
        how = fields.choice(request.resize, Resize, Resize.CROP, "resize")
        reader = ControlReader(catalogue=self.catalogue, checkpoint=checkpoint, limits=self.picture_limits, how=how)
        nets = reader.nets(request)
        pipeline = pipeline_of(request, checkpoint, has_hole=wants_hole(nets))
        prompts = read_prompts(request, self.catalogue, checkpoint)
        scheduler, noise_schedule = names.resolve(request.scheduler, request.noise_schedule)
        own = sources(request, self.picture_limits)
        size_px = self._size(request, checkpoint, own)
        is_started = pipeline in STARTS_FROM_IMAGE
        return Generation(
            checkpoint=checkpoint,
            prompt=prompts.prompt,
            negative_prompt=prompts.negative_prompt,
            loras=prompts.loras,
            embeddings=prompts.embeddings,
            width_px=size_px[0],
            height_px=size_px[1],
            steps=fields.steps(request),
            guidance_scale=fields.guidance(request),
            scheduler=scheduler,
            noise_schedule=noise_schedule,
            eta=fields.eta(request),
            seed=request.seed if request.HasField("seed") else self.random_seed(),
            start=start_of(request, own, size_px, how, is_masked=pipeline in HAS_MASK) if is_started else None,
            controls=reader.controls(request, nets, own, size_px),
            guess_mode=request.guess_mode,
            resize=how if request.HasField("image") or nets else "",
            vae=self.catalogue.vae(request.vae, checkpoint) if request.vae else None,
            clip_skip=_clip_skip(request, nets),
            format=fields.choice(request.format, Format, Format.PNG, "format"),
            quality=fields.quality(request),
            safety=self._safety(request),
            pictures=tuple(digests_of_pictures(request)),
            preview_every_steps=fields.preview_every(request),
            strict=request.strict,
            alone=alone,
        )

    def _size(
        self, request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry, own: Sources
    ) -> tuple[int, int]:
        if request.width_px or request.height_px:
            return asked_size(request.width_px, request.height_px, checkpoint, self.pixels_limit)
        if own.image is not None:
            return size_of_picture(own.image.size, checkpoint, self.pixels_limit)
        return checkpoint.width_px, checkpoint.height_px

    def _safety(self, request: diffusion_pb2.GenerateRequest) -> Safety:
        mode = fields.choice(request.safety_checker, Safety, self.safety, "safety_checker")
        if mode is not Safety.OFF and not self.has_safety_checker:
            raise FailedPrecondition(f"is {mode}; this worker has no safety checker", field="safety_checker")
        return mode


def _clip_skip(request: diffusion_pb2.GenerateRequest, nets: list[ControlNetEntry]) -> int:
    if request.HasField("clip_skip"):
        return fields.whole(request.clip_skip, "clip_skip", fields.CLIP_SKIP_LIMIT)
    return clip_skip_of(nets)
