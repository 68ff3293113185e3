"""What this service tells about its models and finished pictures, as protobuf messages."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Control, Generation
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry, Entry
from services.diffusion.models.folders import checkpoint_entry
from services.diffusion.models.library import Residency
from services.diffusion.models.names import controlnet_aliases
from services.diffusion.parse.pipelines import pipelines_of
from services.diffusion.parse.sizes import size_step_px
from services.diffusion.provenance import KINDS
from services.diffusion.remote import RemoteModel
from services.diffusion.schedulers.names import CLASSES, NOISE_SCHEDULES, SCHEDULE_TITLES, SHORT_NAMES

_Model = diffusion_pb2.Model
_RESIDENCIES = {
    Residency.REMOTE: _Model.RESIDENCY_REMOTE,
    Residency.DISK: _Model.RESIDENCY_DISK,
    Residency.RAM: _Model.RESIDENCY_RAM,
    Residency.VRAM: _Model.RESIDENCY_VRAM,
}


def models_to_proto(
    catalogue: Catalogue,
    *,
    residency_of: Callable[[Entry], Residency] = lambda entry: Residency.DISK,
    digest_of: Callable[[Entry], str] = lambda entry: "",
    remote: Iterable[RemoteModel] = (),
) -> list[_Model]:
    """`digest_of`: sha256, empty where it is not known yet. `remote`: what could be fetched."""
    models = []
    for entry in catalogue.entries:
        model = _Model(
            id=entry.id,
            kind=KINDS[type(entry)],
            size_bytes=entry.size_bytes,
            licence=entry.licence,
            family=catalogue.family_of(entry),
            residency=_RESIDENCIES[residency_of(entry)],
            sha256=digest_of(entry),
            aliases=_aliases(entry.id, entry.reference, KINDS[type(entry)]),
        )
        if isinstance(entry, CheckpointEntry):
            _tell_checkpoint(model, entry, catalogue)
        models.append(model)
    return [*models, *(_remote(model, catalogue.default_id) for model in remote)]


def _aliases(id_: str, reference: str, kind: str) -> list[str]:
    """Its own id is among them, as case and ending do not matter to an alias."""
    if id_ == "*":
        return []
    more = controlnet_aliases(id_) if kind == "controlnet" else []
    return list(dict.fromkeys(filter(None, [id_, reference, *more])))


def _remote(model: RemoteModel, default_id: str) -> _Model:
    told = _Model(
        id=model.id,
        kind=model.kind,
        size_bytes=model.size_bytes,
        licence=model.licence,
        family=model.family,
        residency=_Model.RESIDENCY_DISK if model.is_held else _Model.RESIDENCY_REMOTE,
        is_default=model.kind == "checkpoint" and model.id == default_id,
        aliases=_aliases(model.id, model.reference, model.kind),
    )
    if model.recipe is not None:
        likely = checkpoint_entry(Path(model.id), model.recipe, model.size_bytes)
        told.pipelines[:] = pipelines_of(likely, has_controlnets=True)
        told.width_px, told.height_px, told.size_step_px = likely.width_px, likely.height_px, size_step_px(likely)
        told.schedulers[:] = scheduler_names()
    return told


def scheduler_names() -> list[str]:
    """What a client may choose from: our names, with a noise schedule at the end, A1111's alike, diffusers' classes."""
    ours, theirs = [], []
    for name, known in SHORT_NAMES.items():
        can = CLASSES[known.cls][1]
        ours += [f"{name}_{schedule}" for schedule in NOISE_SCHEDULES if schedule in can]
        if known.a1111:
            endings = ["", *(f" {SCHEDULE_TITLES[schedule]}" for schedule in NOISE_SCHEDULES if schedule in can)]
            theirs += [known.a1111 + ending for ending in endings]
    return [*SHORT_NAMES, *ours, *theirs, *CLASSES]


def _tell_checkpoint(model: _Model, entry: CheckpointEntry, catalogue: Catalogue) -> None:
    model.is_default = entry is catalogue.default_or_none()
    model.pipelines[:] = pipelines_of(entry, has_controlnets=bool(catalogue.controlnets_of(entry)))
    model.width_px, model.height_px = entry.width_px, entry.height_px
    model.size_step_px = size_step_px(entry)
    model.schedulers[:] = scheduler_names()


def effective_to_proto(generation: Generation) -> diffusion_pb2.GenerateRequest:
    """The request with everything filled in; without pictures. LoRAs of the prompt are among the others."""
    effective = diffusion_pb2.GenerateRequest(
        model=generation.checkpoint.id,
        pipeline=generation.pipeline,
        prompt=generation.prompt,
        negative_prompt=generation.negative_prompt,
        width_px=generation.width_px,
        height_px=generation.height_px,
        steps=generation.steps,
        guidance_scale=generation.guidance_scale,
        scheduler=generation.scheduler,
        noise_schedule=generation.noise_schedule,
        eta=generation.eta,
        seed=generation.seed,
        controls=[_control(control) for control in generation.controls],
        guess_mode=generation.guess_mode,
        resize=generation.resize,
        loras=[
            diffusion_pb2.LoraUse(model=use.entry.id, weight=use.unet_weight, text_encoder_weight=use.text_weight)
            for use in generation.loras
        ],
        vae=generation.vae.id if generation.vae else "",
        embeddings=[entry.id for entry in generation.embeddings],
        clip_skip=generation.clip_skip,
        format=generation.format,
        quality=generation.quality,
        safety_checker=generation.safety,
        preview_every_steps=generation.preview_every_steps,
        strict=generation.strict,
    )
    if generation.start is not None:
        effective.strength = generation.start.strength
    return effective


def _control(control: Control) -> diffusion_pb2.Control:
    told = diffusion_pb2.Control(
        controlnet=control.controlnet.id,
        scale=control.scale,
        start=control.start,
        end=control.end,
        annotator=control.annotator,
    )
    if control.annotator_parameters:
        told.annotator_parameters.update(json.loads(control.annotator_parameters))
    return told
