"""`fanlight nodes`: invite machines, and list, drain, revoke and remove those that joined."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway
from fanlight.errors import InvalidField

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.nodes.v1.nodes_pb2 import CreateInviteResponse, Invite, Node

app = typer.Typer(help="Invite machines to work, and manage those that joined.", no_args_is_help=True)

NodeId = Annotated[str, typer.Argument(metavar="NODE", help="Its id, from `fanlight nodes list`.", show_default=False)]

_DURATION = re.compile(r"(\d{1,9})(s|m|h|d)")
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def parse_duration(text: str, *, option: str = "--valid") -> float:
    """Seconds of `90s`, `30m`, `12h` or `7d`."""
    found = _DURATION.fullmatch(text)
    if not found:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 30m, 12h or 7d", param_hint=option)
    return float(int(found[1]) * _UNITS_S[found[2]])


def parse_label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, such as site=attic", param_hint="--label")
    return name, value


@app.command()
def invite(
    uses: Annotated[int, typer.Option(min=1, max=10_000, help="How many nodes may join with the code.")] = 1,
    valid: Annotated[str, typer.Option(metavar="TIME", help="How long: 90s, 30m, 12h or 7d.")] = "1h",
    pool: Annotated[str, typer.Option(help="The pool of its nodes.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="May be repeated.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only for this stage; may be repeated.")] = None,
    comment: Annotated[str, typer.Option(help="For yourself.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the code there, unless the code that is there can still be used."),
    ] = None,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Print a join code. It is a secret: who has it can join."""
    from fanlight.cli.output import print_json, say, to_dict
    from fanlight.cli.session import talk, write_secret

    ttl_s, labels = parse_duration(valid), dict(map(parse_label, label or ()))

    async def make(client: "AsyncClient") -> "CreateInviteResponse | None":
        known = _invite_in(out) if out is not None else ""
        if known and known in [each.id for each in await client.nodes.list_invites()]:
            return None
        return await client.nodes.invite(
            uses=uses, ttl_s=ttl_s, pool=pool, labels=labels, stages=stage or (), comment=comment
        )

    made = talk(gateway, make)
    if made is None:
        say(f"{out}: its code can still be used")
        return
    if out is not None:
        write_secret(out, f"{made.join_code}\n")
        return
    if as_json:
        print_json(to_dict(made))
        return
    print(made.join_code)
    times = "one node" if uses == 1 else f"{uses:,} nodes"
    say(f"For {times}, until {made.invite.expire_time.ToJsonString()[:19]} UTC. On the node: FANLIGHT_WORKER_JOIN_CODE")


def _invite_in(file: Path) -> str:
    """The id of the invitation whose code is in the file; empty where there is none."""
    from fanlight.contract.join_code import parse_join_code

    try:
        return parse_join_code(file.read_text()).invite
    except (OSError, UnicodeDecodeError, InvalidField):
        return ""


@app.command()
def invites(gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """List invitations that can still be used."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.nodes.list_invites())
    if as_json:
        print_json([to_dict(each) for each in found])
    else:
        print_columns(("ID", "USED", "UNTIL", "POOL", "STAGES", "COMMENT"), [_invite_row(each) for each in found])


@app.command()
def uninvite(
    invite_id: Annotated[str, typer.Argument(metavar="ID", help="From `fanlight nodes invites`.", show_default=False)],
    gateway: Gateway = DEFAULT_GATEWAY,
) -> None:
    """End an invitation. Nodes that joined with it stay."""
    from fanlight.cli.session import talk

    talk(gateway, lambda client: client.nodes.remove_invite(invite_id))


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the newest first.")] = 50,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """List nodes, those that joined last first."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.nodes.list(limit=limit))
    if as_json:
        print_json([to_dict(each) for each in found])
    else:
        print_columns(("NODE", "NAME", "STATE", "POOL", "PROOF", "UNTIL", "WORKERS"), [_row(each) for each in found])


@app.command()
def show(node: NodeId, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show one node: who it is, what it may do, and how its results were checked."""
    from fanlight.cli.session import talk

    _print(talk(gateway, lambda client: client.nodes.get(node)), as_json=as_json)


@app.command()
def drain(
    node: NodeId,
    undo: Annotated[bool, typer.Option("--undo", help="Lease it tasks again.")] = False,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Let a node finish what it leases, and lease it no more tasks."""
    from fanlight.cli.session import talk

    _print(talk(gateway, lambda client: client.nodes.drain(node, undo=undo)), as_json=as_json)


@app.command()
def revoke(
    node: NodeId,
    reason: Annotated[str, typer.Option(help="For yourself.")] = "",
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """End a node's credentials and leases at once, and drop the cached control images that it made."""
    from fanlight.cli.session import talk

    _print(talk(gateway, lambda client: client.nodes.revoke(node, reason=reason)), as_json=as_json)


@app.command()
def purge(node: NodeId, gateway: Gateway = DEFAULT_GATEWAY) -> None:
    """Drop the cached control images that a node made."""
    from fanlight.cli.session import talk

    dropped = talk(gateway, lambda client: client.nodes.purge(node))
    print(f"dropped {dropped:,} cached control images")


@app.command()
def remove(node: NodeId, gateway: Gateway = DEFAULT_GATEWAY) -> None:
    """Forget a revoked or expired node."""
    from fanlight.cli.session import talk

    talk(gateway, lambda client: client.nodes.remove(node))


def _invite_row(invite: "Invite") -> tuple[object, ...]:
    stages = ",".join(invite.grant.stages) or "all"
    until = invite.expire_time.ToJsonString()[:19]
    return invite.id, f"{invite.used}/{invite.uses}", until, invite.grant.pool, stages, invite.comment or "-"


def _row(node: "Node") -> tuple[object, ...]:
    until = node.expire_time.ToJsonString()[:19] if node.HasField("expire_time") else "-"
    return node.id, node.name, _state(node), node.grant.pool, node.proof, until, len(node.workers)


def _state(node: "Node") -> str:
    return type(node).State.Name(node.state).removeprefix("STATE_").lower()


def _print(node: "Node", *, as_json: bool) -> None:
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.terminal import printable

    if as_json:
        print_json(to_dict(node))
        return
    print_columns(("NODE", "NAME", "STATE", "POOL", "PROOF", "UNTIL", "WORKERS"), [_row(node)])
    labels = " ".join(f"{label.name}={label.value}" for label in node.grant.labels)
    facts = {
        "subject": node.subject,
        "labels": labels,
        "stages": ", ".join(node.grant.stages),
        "reason": node.reason,
        "checked results": f"{node.checked_results}, {node.false_results} false" if node.checked_results else "",
        "workers": ", ".join(node.workers),
    }
    for name, value in facts.items():
        if value:
            print(f"{name}: {printable(value)}")
