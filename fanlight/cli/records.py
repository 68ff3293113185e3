"""`fanlight records`: the records of the gateway's store that cannot be read. Needs the operator's token."""

from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway

if TYPE_CHECKING:
    from fanlight.records.v1.records_pb2 import DamagedRecord

app = typer.Typer(help="List, show and remove stored records that cannot be read.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="RECORD", help="`BUCKET/KEY`, as listed.", show_default=False)]
SHOWN_CHARACTERS = 4_000


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = 100,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """List the records that the gateway has set aside, and why."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.list_damaged_records(limit=limit))
    if as_json:
        print_json([to_dict(each) for each in found])
    else:
        _print(found)


@app.command()
def show(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show one such record with its first bytes."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.get_damaged_record(name))
    if as_json:
        print_json(to_dict(found))
        return
    _print([found])
    # Escaped: nothing in a damaged record may reach the terminal as it is.
    print(f"\n{ascii(found.value)[2:-1][:SHOWN_CHARACTERS]}")


@app.command()
def remove(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Remove such a record from the store, for good."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.remove_damaged_record(name))
    if as_json:
        print_json(to_dict(found))
    else:
        print(f"removed {ascii(found.name)[1:-1]}")


def _print(found: "list[DamagedRecord]") -> None:
    from fanlight.cli.output import print_columns

    rows = [
        (ascii(each.name)[1:-1], each.size_bytes, each.found_time.ToJsonString()[:19], ascii(each.why)[1:-1])
        for each in found
    ]
    print_columns(("RECORD", "BYTES", "FOUND", "WHY"), rows)
