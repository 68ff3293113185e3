"""`fanlight models show ID`: all that the fleet says of one model, with the values that its requests get by default."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fanlight.contract import limits
from fanlight.contract.names import find_name, near_names
from fanlight.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from fanlight.diffusion.v1.diffusion_pb2 import Model


def show_model(gateway: str, words: Sequence[str], *, as_json: bool) -> None:
    """`words`: `show` and an id or alias. InvalidInput, NotFound."""
    from fanlight.cli.output import print_json, print_line, to_dict
    from fanlight.cli.session import talk

    if len(words) != 2 or words[0] != "show":
        raise InvalidInput("`fanlight models` takes nothing, or `show` and a model's id")
    found = _named(talk(gateway, lambda client: client.list_models()), words[1])
    if as_json:
        print_json([to_dict(each) for each in found])
        return
    for number, model in enumerate(found):
        if number:
            print()
        rows = [row for row in _rows(model) if row[1]]
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print_line(f"{name.ljust(width)}  {value}")


def _named(models: "Sequence[Model]", name: str) -> "list[Model]":
    """All of the id that the name stands for: several kinds and families may share one."""
    id_ = find_name({each.id: each.aliases for each in models}, name)
    if not id_:
        near = ", ".join(near_names(name, [each.id for each in models]))
        raise NotFound(f"no worker offers a model {name[:80]!r}{f'; near it: {near}' if near else ''}")
    return [each for each in models if each.id == id_]


def _rows(model: "Model") -> Iterator[tuple[str, str]]:
    yield "id", model.id
    yield "kind", model.kind
    yield "family", model.family
    yield "default model", "yes" if model.is_default else ""
    yield "license", model.license
    yield "bytes", f"{model.size_bytes / 2**20:.1f} MiB" if model.size_bytes else ""
    yield "sha256", model.sha256
    yield "also called", ", ".join(each for each in model.aliases if each != model.id)
    yield "pipelines", ", ".join(model.pipelines)
    yield "native size", _size(model.width_px, model.height_px)
    yield "size step", f"{model.size_step_px} px" if model.size_step_px else ""
    yield "clip skip", f"up to {model.text_encoder_layers}" if model.text_encoder_layers else ""
    if model.kind == "checkpoint":
        yield from _defaults(model)


def _defaults(model: "Model") -> Iterator[tuple[str, str]]:
    """What a request gets that leaves them out."""
    own = model.defaults
    guidance = own.guidance_scale if own.HasField("guidance_scale") else limits.DEFAULT_GUIDANCE_SCALE
    scheduler = own.scheduler or limits.DEFAULT_SCHEDULER
    yield "variant", own.variant
    yield "steps", str(own.steps or limits.DEFAULT_STEPS)
    yield "guidance scale", f"{guidance:g}"
    yield "scheduler", f"{scheduler}, {own.noise_schedule}" if own.noise_schedule else scheduler
    yield "size", _size(own.width_px, own.height_px) or _size(model.width_px, model.height_px)
    yield "defaults from", "; ".join(own.sources)


def _size(width_px: int, height_px: int) -> str:
    return f"{width_px} x {height_px}" if width_px and height_px else ""
