"""What this service tells about its models and finished pictures, as protobuf messages."""

from collections.abc import Container

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Generation
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.parse import CONTROLNET, PIPELINES, TEXT2IMG, size_step_px
from services.diffusion.schedulers.names import SCHEDULERS

_Model = diffusion_pb2.Model


def models_to_proto(catalogue: Catalogue, *, held: Container[object], on_gpu: bool) -> list[_Model]:
    """`held`: the entries of the models in memory."""
    models = [_checkpoint(entry, catalogue) for entry in catalogue.checkpoints]
    models += [_controlnet(entry, catalogue) for entry in catalogue.controlnets]
    in_memory = _Model.RESIDENCY_VRAM if on_gpu else _Model.RESIDENCY_RAM
    for entry, model in zip(catalogue.entries, models, strict=True):
        model.residency = in_memory if entry in held else _Model.RESIDENCY_DISK
    return models


def _checkpoint(entry: CheckpointEntry, catalogue: Catalogue) -> _Model:
    return _Model(
        id=entry.id,
        kind="checkpoint",
        is_default=entry == catalogue.default(),
        size_bytes=entry.size_bytes,
        licence=entry.licence,
        pipelines=PIPELINES if catalogue.controlnets_of(entry) else [TEXT2IMG],
        width_px=entry.width_px,
        height_px=entry.height_px,
        size_step_px=size_step_px(entry),
        family=catalogue.family(entry.shape),
        schedulers=list(SCHEDULERS),
    )


def _controlnet(entry: ControlNetEntry, catalogue: Catalogue) -> _Model:
    return _Model(
        id=entry.id,
        kind="controlnet",
        size_bytes=entry.size_bytes,
        licence=entry.licence,
        family=catalogue.family(entry.shape),
    )


def effective_to_proto(generation: Generation) -> diffusion_pb2.GenerateRequest:
    """The request with everything filled in; without pictures."""
    return diffusion_pb2.GenerateRequest(
        model=generation.checkpoint.id,
        pipeline=CONTROLNET if generation.controls else TEXT2IMG,
        prompt=generation.prompt,
        negative_prompt=generation.negative_prompt,
        width_px=generation.width_px,
        height_px=generation.height_px,
        steps=generation.steps,
        guidance_scale=generation.guidance_scale,
        scheduler=generation.scheduler,
        seed=generation.seed,
        controls=[
            diffusion_pb2.Control(
                controlnet=control.controlnet.id, scale=control.scale, start=control.start, end=control.end
            )
            for control in generation.controls
        ],
        preview_every_steps=generation.preview_every_steps,
    )
