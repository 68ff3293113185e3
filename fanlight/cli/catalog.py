"""`fanlight annotators | models | workers`: list what the fleet offers, and show one model."""

from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from google.protobuf.message import Message

    from fanlight.client import AsyncClient
    from fanlight.diffusion.v1.diffusion_pb2 import LeftOutModel, Model
    from fanlight.gateway.v1.gateway_pb2 import WorkerStatus
    from fanlight.preprocessor.v1.preprocessor_pb2 import Annotator, Parameter

MIB = 1024 * 1024

Each = TypeVar("Each", bound="Message")


def annotators(gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """List the annotators that the workers offer, with their parameters."""
    from fanlight.cli.output import print_columns, print_json, print_line, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.list_annotators())
    if as_json:
        print_json([to_dict(each) for each in found])
        return
    parameters = {each.id: [_parameter(parameter) for parameter in each.parameters] for each in found}
    shared = _shared(list(parameters.values()))

    def row(annotator: "Annotator") -> tuple[str, ...]:
        own = ", ".join(each for each in parameters[annotator.id] if each not in shared)
        return annotator.id, ", ".join(annotator.controlnets) or "-", annotator.description, own or "-"

    print_columns(("ANNOTATOR", "CONTROLNETS", "WHAT IT DOES", "PARAMETERS"), [row(each) for each in found])
    if shared:
        print()
        print_line(f"all annotators also take {', '.join(shared)}")


def _shared(lists: "Sequence[Sequence[str]]") -> list[str]:
    """The parameters that all annotators have: printed once, not in every row."""
    return [each for each in lists[0] if all(each in one for one in lists)] if len(lists) > 1 else []


def _parameter(parameter: "Parameter") -> str:
    default = f"={_value(parameter)}" if parameter.HasField("default_value") else ""
    bounds = f" ({_number(parameter.minimum)} to {_number(parameter.maximum)})" if parameter.HasField("maximum") else ""
    choices = f" ({'|'.join(parameter.choices)})" if parameter.choices else ""
    return f"{parameter.name}{default}{bounds}{choices}"


def _value(parameter: "Parameter") -> str:
    value = parameter.default_value
    kind = value.WhichOneof("kind")
    if kind == "bool_value":
        return str(value.bool_value).lower()
    return _number(value.number_value) if kind == "number_value" else value.string_value


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else str(value)


LeftOut = Annotated[
    bool, typer.Option("--left-out", help="List the files that the workers found and do not use, and why.")
]
# By the numbers of the proto's enum Residency.
_WHERE = {1: "to be fetched", 2: "disk", 3: "RAM", 4: "VRAM"}


Show = Annotated[list[str] | None, typer.Argument(metavar="[show ID]", help="One model, with its defaults.")]


def models(
    show: Show = None, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False, left_out: LeftOut = False
) -> None:
    """List the models that the workers offer, or show one with its defaults, or list what is not used."""
    if left_out:
        _list_left_out(gateway, as_json=as_json)
        return
    if show:
        from fanlight.cli.model_card import show_model

        show_model(gateway, show, as_json=as_json)
        return

    def row(model: "Model") -> tuple[str, ...]:
        size = f"{model.width_px}x{model.height_px}" if model.width_px else "-"
        mebibytes = f"{model.size_bytes / MIB:.1f} MiB" if model.size_bytes else "-"
        default = "; ".join(filter(None, ("default" if model.is_default else "", model.note)))
        where = _WHERE.get(model.residency, "-")
        return model.id, model.kind, model.family or "-", size, mebibytes, where, model.license or "-", default

    titles = ("MODEL", "KIND", "FAMILY", "SIZE", "BYTES", "WHERE", "LICENSE", "")
    _list(gateway, lambda client: client.list_models(), titles, row, as_json=as_json)


def _list_left_out(gateway: str, *, as_json: bool) -> None:
    def row(each: "LeftOutModel") -> tuple[str, ...]:
        return each.path, each.reason, ", ".join(each.nodes)

    _list(gateway, lambda client: client.list_left_out(), ("LEFT OUT", "WHY", "NODES"), row, as_json=as_json)


def workers(gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """List the workers that polled recently."""

    def row(status: "WorkerStatus") -> tuple[str, ...]:
        worker = status.worker
        state = "draining" if status.draining else "live" if status.live else "gone"
        busy = f"{len(status.tasks)}/{worker.slots}"
        last_for = "; ".join(
            f"{each.need} until {each.until_time.ToJsonString()}: {each.why}" for each in status.avoided
        )
        return worker.id, worker.stage, worker.node, worker.device or "-", state, busy, last_for

    titles = ("WORKER", "STAGE", "NODE", "DEVICE", "STATE", "BUSY", "AFTER OTHERS FOR")
    _list(gateway, lambda client: client.list_workers(), titles, row, as_json=as_json)


def _list(
    gateway: str,
    ask: "Callable[[AsyncClient], Awaitable[list[Each]]]",
    titles: "Sequence[str]",
    row: "Callable[[Each], Sequence[object]]",
    *,
    as_json: bool,
) -> None:
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, ask)
    if as_json:
        print_json([to_dict(each) for each in found])
    else:
        print_columns(titles, [row(each) for each in found])
