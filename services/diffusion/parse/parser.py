"""From a GenerateRequest to a Generation and back: looks up what it names, decodes what it sends, fills in defaults."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fanlight.contract import generation as contract
from fanlight.contract import schedulers
from fanlight.contract.filled import missing
from fanlight.contract.masks import sides_of
from fanlight.contract.warnings import bounded_warnings
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition
from services.diffusion.engine.generation import DEFAULTS_WITH_CONTROLNET, ControlInput, Generation, Safety
from services.diffusion.images import Resize
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.defaults import defaults_of
from services.diffusion.models.entries import CheckpointEntry
from services.diffusion.parse.abilities import Abilities, checked_size, pipeline_of, size_of_image, size_step_px
from services.diffusion.parse.images import (
    ControlReader,
    Sources,
    canvas_of,
    digests_of_images,
    mask_options,
    mask_warnings,
    sources,
    start_of,
)
from services.diffusion.parse.prompts import read_prompts
from services.kernel.images import ImageLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    """From a GenerateRequest to a Generation."""

    catalog: ModelCatalog
    abilities: Abilities
    picture_limits: ImageLimits
    # Seeds for requests without one.
    random_seed: Callable[[], int]
    # The default.
    safety: Safety = Safety.OFF

    def check(self, request: diffusion_pb2.GenerateRequest) -> None:
        """Refuse what can be refused before anything is looked up or fetched. Raises as the contract does."""
        contract.check(request)
        contract.check_one_image(request)

    def parse(self, request: diffusion_pb2.GenerateRequest, *, alone: bool = False) -> Generation:
        """Includes `check`. Decodes images, so it may take a while.

        InvalidField where no worker could ever do it; NotFound, FailedPrecondition and TooLarge where another may.
        """
        self.check(request)
        checkpoint = self.catalog.checkpoint(request.model) if request.model else self.catalog.default()
        _require_vae(request, checkpoint)
        request = _with_defaults(request, checkpoint)
        how = Resize(request.resize or Resize.CROP)
        reader = ControlReader(catalog=self.catalog, checkpoint=checkpoint, picture_limits=self.picture_limits, how=how)
        nets = reader.nets(request)
        pipeline = pipeline_of(request, checkpoint)
        prompts = read_prompts(request, self.catalog, checkpoint)
        scheduler, noise_schedule = schedulers.resolve(request.scheduler, request.noise_schedule)
        own = sources(request, self.picture_limits)
        width_px, height_px = self._size(request, checkpoint, own)
        size_px = (width_px, height_px)
        is_started, is_masked = pipeline in contract.STARTS_FROM_IMAGE, pipeline in contract.HAS_MASK
        defaults: dict[str, object] = {"safety_checker": self.safety}
        canvas = canvas_of(request, own, size_px, how, size_step_px=size_step_px(checkpoint))
        for net in nets:
            defaults.update(DEFAULTS_WITH_CONTROLNET.get(net.id, {}))
        options: dict[str, Any] = {
            **read_options(request, defaults),
            **self._variation(request),
            **mask_options(request, is_masked=is_masked),
            "negative_prompt": prompts.negative_prompt,
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
            start=start_of(request, canvas, is_masked=is_masked) if is_started else None,
            controls=reader.controls(request, nets, own, canvas, size_px),
            vae=self.catalog.vae(request.vae, checkpoint) if request.vae else None,
            image_digests=tuple(digests_of_images(request)),
            alone=alone,
            warnings=bounded_warnings(
                [
                    *contract.warnings_of(request),
                    *prompts.warnings,
                    *_notes(checkpoint),
                    *mask_warnings(canvas, is_masked=is_masked),
                ]
            ),
            **options,
        )
        self.abilities.check(effective_to_proto(generation), checkpoint)
        return generation

    def _size(
        self, request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry, own: Sources
    ) -> tuple[int, int]:
        limit = self.abilities.pixels_limit
        if request.width_px or request.height_px:
            return checked_size(request.width_px, request.height_px, checkpoint, limit)
        if own.image is not None and not request.only_masked:
            return size_of_image(own.image.size, sides_of(request), checkpoint, limit)
        own_size = defaults_of(checkpoint)
        if own_size.width_px and own_size.height_px:
            return checked_size(own_size.width_px, own_size.height_px, checkpoint, limit)
        return checkpoint.width_px, checkpoint.height_px

    def _variation(self, request: diffusion_pb2.GenerateRequest) -> dict[str, object]:
        """None at a strength of 0, where the seed's noise is used alone."""
        if not request.variation_strength:
            return {"variation_seed": None}
        seed = request.variation_seed if request.HasField("variation_seed") else self.random_seed()
        return {"variation_seed": seed}


def _with_defaults(
    request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry
) -> diffusion_pb2.GenerateRequest:
    """With the checkpoint's defaults for what it leaves out: for direct calls, as the gateway fills in the others'."""
    found = missing(request, defaults_of(checkpoint))
    if found == diffusion_pb2.GenerateRequest():
        return request
    filled = diffusion_pb2.GenerateRequest()
    filled.CopyFrom(request)
    filled.MergeFrom(found)
    return filled


_FIELDS = diffusion_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
# Options with a default, by name. Models have no default in the request's own type.
_DEFAULTS = {
    own.name: own.default
    for own in fields(Generation)
    if own.default is not MISSING and own.name in _FIELDS and own.name != "vae" and not _FIELDS[own.name].is_repeated
}


def _notes(checkpoint: CheckpointEntry) -> list[str]:
    """What is odd about the checkpoint's file, in sentences."""
    return [f"{checkpoint.id}: {note}" for note in checkpoint.recipe.notes]


def _require_vae(request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry) -> None:
    if not request.vae and not checkpoint.recipe.has_vae:
        raise FailedPrecondition(f"is empty, and {checkpoint.id} has no VAE of its own; name one", field="vae")


def read_options(request: diffusion_pb2.GenerateRequest, defaults: Mapping[str, object]) -> dict[str, object]:
    """By name. `defaults`: in place of a Generation's own, for options that are unset in the request."""
    return {
        name: _typed(getattr(request, name), default) if is_set(request, name) else defaults.get(name, default)
        for name, default in _DEFAULTS.items()
    }


def is_set(request: diffusion_pb2.GenerateRequest, name: str) -> bool:
    if _FIELDS[name].has_presence:
        return request.HasField(name)  # type: ignore[arg-type]  # it has that field
    return bool(getattr(request, name))


def _typed(value: object, default: object) -> object:
    """As an enum where the default is one; the contract has checked the value."""
    return value if default is None else type(default)(value)  # type: ignore[call-arg]  # enums and numbers take one


# The request's options that a Generation has under the same name.
_SHARED_OPTIONS = [
    field.name
    for field in diffusion_pb2.GenerateRequest.DESCRIPTOR.fields
    if field.message_type is None and not field.is_repeated and hasattr(Generation, field.name) and field.name != "vae"
]


def effective_to_proto(generation: Generation) -> diffusion_pb2.GenerateRequest:
    """The request with all defaults filled in, without images. LoRAs of the prompt are among the others."""
    effective = diffusion_pb2.GenerateRequest(
        controls=[_control_to_proto(control) for control in generation.controls],
        loras=[
            diffusion_pb2.LoraUse(model=use.entry.id, weight=use.unet_weight, text_encoder_weight=use.text_weight)
            for use in generation.loras
        ],
        vae=generation.vae.id if generation.vae else "",
        embeddings=[entry.id for entry in generation.embeddings if not entry.bundled_in],
    )
    for option in _SHARED_OPTIONS:
        value = getattr(generation, option)
        if value is not None:
            setattr(effective, option, value)
    return effective


def _control_to_proto(control: ControlInput) -> diffusion_pb2.Control:
    effective = diffusion_pb2.Control(
        controlnet=control.controlnet.id,
        scale=control.scale,
        start=control.start,
        end=control.end,
        resize=control.resize,
        mode=control.mode,
    )
    if control.annotator:
        effective.made_by.annotator = control.annotator
        if control.annotator_parameters:
            effective.made_by.parameters.update(json.loads(control.annotator_parameters))
    return effective
