"""`fanlight keys`: create, list, rotate and revoke API keys."""

from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.nodes import parse_duration
from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway

if TYPE_CHECKING:
    from fanlight.keys.v1.keys_pb2 import CreateKeyResponse, Key

app = typer.Typer(help="Create, list, rotate and revoke API keys.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(metavar="KEY", help="Its id, from `fanlight keys list`.", show_default=False)]
ROLES = ("operator", "admin", "submit", "read", "metrics", "scaler")


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose; empty: your own.")] = "",
    role: Annotated[str, typer.Option(metavar="ROLE", help=f"{', '.join(ROLES)}.")] = "submit",
    note: Annotated[str, typer.Option(help="For yourself.")] = "",
    valid: Annotated[
        str, typer.Option(metavar="TIME", help="How long: 30m, 12h or 90d. Empty: until it is revoked.")
    ] = "",
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Print a new key's secret. It is shown this once."""
    from fanlight.cli.session import talk

    number = _role(role)
    ttl_s = parse_duration(valid) if valid else 0.0
    _print_created(
        talk(gateway, lambda client: client.keys.create(tenant=tenant, role=number, note=note, ttl_s=ttl_s)),
        as_json=as_json,
    )


@app.command("list")
def list_(
    tenant: Annotated[str, typer.Option(help="Whose; empty: all that you manage.")] = "",
    ended: Annotated[bool, typer.Option("--ended", help="Those that have ended, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the newest first.")] = 50,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """List keys, the newest first."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.keys.list(tenant=tenant, with_ended=ended, limit=limit))
    if as_json:
        print_json([to_dict(each) for each in found])
    else:
        print_columns(("KEY", "TENANT", "ROLE", "STATE", "UNTIL", "LAST USE", "NOTE"), [_row(each) for each in found])


@app.command()
def rotate(
    key: KeyId,
    overlap: Annotated[str, typer.Option(metavar="TIME", help="How long the old one stays valid.")] = "5m",
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Print the secret of a key that takes this one's place."""
    from fanlight.cli.session import talk

    overlap_s = parse_duration(overlap, option="--overlap")
    _print_created(talk(gateway, lambda client: client.keys.rotate(key, overlap_s=overlap_s)), as_json=as_json)


@app.command()
def revoke(key: KeyId, gateway: Gateway = DEFAULT_GATEWAY) -> None:
    """End a key, and the sessions that were opened with it."""
    from fanlight.cli.session import talk

    talk(gateway, lambda client: client.keys.revoke(key))


def _role(name: str) -> "Key.Role.ValueType":
    from fanlight.keys.v1.keys_pb2 import Key

    if name not in ROLES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(ROLES)}", param_hint="--role")
    return Key.Role.Value(f"ROLE_{name.upper()}")


def _print_created(made: "CreateKeyResponse", *, as_json: bool) -> None:
    from fanlight.cli.output import print_json, say, to_dict

    if as_json:
        print_json(to_dict(made))
        return
    print(made.secret)
    key = made.key
    until = f", until {_time(key, 'expire_time')} UTC" if key.HasField("expire_time") else ""
    say(f"Key {key.id}: {_word(key, 'role')} of {key.tenant}{until}. Its holder sets it as FANLIGHT_TOKEN.")


def _row(key: "Key") -> tuple[object, ...]:
    until, use = _time(key, "expire_time") or "-", _time(key, "use_time") or "never"
    return key.id, key.tenant, _word(key, "role"), _word(key, "state"), until, use, _note(key)


def _note(key: "Key") -> str:
    if key.is_session:
        return f"session of {key.subject or key.parent}"
    return key.note or "-"


def _time(key: "Key", name: str) -> str:
    return str(getattr(key, name).ToJsonString()[:19]) if key.HasField(name) else ""  # type: ignore[arg-type]  # a name of the message


def _word(key: "Key", name: str) -> str:
    """The name of its role or state."""
    kind = type(key)
    value = kind.Role.Name(key.role) if name == "role" else kind.State.Name(key.state)
    return value.partition("_")[2].lower()
