"""A request's options that a Generation has under the same name: set by the request, or else their default."""

from collections.abc import Mapping
from dataclasses import MISSING, fields

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Generation

_FIELDS = diffusion_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
# Those with a default. Entries of models have none in the request's own type.
_OPTIONS = {
    own.name: own.default
    for own in fields(Generation)
    if own.default is not MISSING and own.name in _FIELDS and own.name != "vae" and not _FIELDS[own.name].is_repeated
}


def read_options(request: diffusion_pb2.GenerateRequest, defaults: Mapping[str, object]) -> dict[str, object]:
    """By name. `defaults`: in place of a Generation's own, for what the request leaves open."""
    return {
        name: _typed(getattr(request, name), default) if is_set(request, name) else defaults.get(name, default)
        for name, default in _OPTIONS.items()
    }


def is_set(request: diffusion_pb2.GenerateRequest, name: str) -> bool:
    if _FIELDS[name].has_presence:
        return request.HasField(name)  # type: ignore[arg-type]  # it has that field
    return bool(getattr(request, name))


def _typed(value: object, default: object) -> object:
    """As an enum where the default is one; the contract has checked the value."""
    return value if default is None else type(default)(value)  # type: ignore[call-arg]  # enums and numbers take one
