"""A Generation as the request that it came from, with everything filled in that was left open."""

import json

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Control, Generation

# The request's options that a Generation has under the same name.
_OPTIONS = [
    field.name
    for field in diffusion_pb2.GenerateRequest.DESCRIPTOR.fields
    if field.message_type is None and not field.is_repeated and hasattr(Generation, field.name) and field.name != "vae"
]


def effective_to_proto(generation: Generation) -> diffusion_pb2.GenerateRequest:
    """The request with everything filled in; without pictures. LoRAs of the prompt are among the others."""
    effective = diffusion_pb2.GenerateRequest(
        controls=[_control(control) for control in generation.controls],
        loras=[
            diffusion_pb2.LoraUse(model=use.entry.id, weight=use.unet_weight, text_encoder_weight=use.text_weight)
            for use in generation.loras
        ],
        vae=generation.vae.id if generation.vae else "",
        embeddings=[entry.id for entry in generation.embeddings],
    )
    for option in _OPTIONS:
        value = getattr(generation, option)
        if value is not None:
            setattr(effective, option, value)
    return effective


def _control(control: Control) -> diffusion_pb2.Control:
    effective = diffusion_pb2.Control(
        controlnet=control.controlnet.id, scale=control.scale, start=control.start, end=control.end
    )
    if control.annotator:
        effective.made_by.annotator = control.annotator
        if control.annotator_parameters:
            effective.made_by.parameters.update(json.loads(control.annotator_parameters))
    return effective
