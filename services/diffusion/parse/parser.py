"""The whole request, which the contract has let pass: what it names is looked up, what it sends is decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fanlight.contract import generation as contract
from fanlight.contract import schedulers
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.abilities import Abilities
from services.diffusion.effective import effective_to_proto
from services.diffusion.generation import DEFAULTS_WITH_CONTROLNET, Generation, Safety
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry
from services.diffusion.parse.controls import ControlReader
from services.diffusion.parse.options import read_options
from services.diffusion.parse.pictures import Sources, digests_of_pictures, sources, start_of
from services.diffusion.parse.pipelines import pipeline_of
from services.diffusion.parse.prompts import read_prompts
from services.diffusion.parse.sizes import asked_size, size_of_picture
from services.diffusion.pictures.fit import Resize
from services.kernel.pictures import PictureLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    catalogue: Catalogue
    abilities: Abilities
    picture_limits: PictureLimits
    # Seeds for requests without one.
    random_seed: Callable[[], int]
    # For requests that do not say.
    safety: Safety = Safety.OFF

    def check(self, request: diffusion_pb2.GenerateRequest) -> None:
        """What can be said before anything is looked up or fetched. Raises as the contract does."""
        contract.check(request)
        contract.check_one_image(request)

    def parse(self, request: diffusion_pb2.GenerateRequest, *, alone: bool = False) -> Generation:
        """`check` comes first. Decodes pictures, so it may take a while.

        InvalidField where no worker could ever do it; NotFound, FailedPrecondition and TooLarge where another may.
        """
        self.check(request)
        checkpoint = self.catalogue.checkpoint(request.model) if request.model else self.catalogue.default()
        how = Resize(request.resize or Resize.CROP)
        reader = ControlReader(
            catalogue=self.catalogue, checkpoint=checkpoint, picture_limits=self.picture_limits, how=how
        )
        nets = reader.nets(request)
        pipeline = pipeline_of(request, checkpoint)
        prompts = read_prompts(request, self.catalogue, checkpoint)
        scheduler, noise_schedule = schedulers.resolve(request.scheduler, request.noise_schedule)
        own = sources(request, self.picture_limits)
        width_px, height_px = self._size(request, checkpoint, own)
        size_px = (width_px, height_px)
        is_started, is_masked = pipeline in contract.STARTS_FROM_IMAGE, pipeline in contract.HAS_MASK
        defaults: dict[str, object] = {"safety_checker": self.safety}
        for net in nets:
            defaults.update(DEFAULTS_WITH_CONTROLNET.get(net.id, {}))
        options: dict[str, Any] = {
            **read_options(request, defaults),
            **self._variation(request),
            "noise_schedule": noise_schedule,
            "resize": how if request.HasField("image") or nets else "",
        }
        generation = Generation(
            checkpoint=checkpoint,
            prompt=prompts.prompt,
            loras=prompts.loras,
            embeddings=prompts.embeddings,
            width_px=width_px,
            height_px=height_px,
            scheduler=scheduler,
            seed=request.seed if request.HasField("seed") else self.random_seed(),
            start=start_of(request, own, size_px, how, is_masked=is_masked) if is_started else None,
            controls=reader.controls(request, nets, own, size_px),
            vae=self.catalogue.vae(request.vae, checkpoint) if request.vae else None,
            pictures=tuple(digests_of_pictures(request)),
            alone=alone,
            **options,
        )
        self.abilities.check(effective_to_proto(generation), checkpoint)
        return generation

    def _size(
        self, request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry, own: Sources
    ) -> tuple[int, int]:
        limit = self.abilities.pixels_limit
        if request.width_px or request.height_px:
            return asked_size(request.width_px, request.height_px, checkpoint, limit)
        if own.image is not None:
            return size_of_picture(own.image.size, checkpoint, limit)
        return checkpoint.width_px, checkpoint.height_px

    def _variation(self, request: diffusion_pb2.GenerateRequest) -> dict[str, object]:
        """Nothing at a strength of 0: the seed's noise is not touched then."""
        if not request.variation_strength:
            return {"variation_seed": None}
        seed = request.variation_seed if request.HasField("variation_seed") else self.random_seed()
        return {"variation_seed": seed}
