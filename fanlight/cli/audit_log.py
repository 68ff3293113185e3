"""`fanlight audit-log`: list, follow and verify who changed what, and who read another tenant's data."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway
from fanlight.errors import FanlightError, InvalidInput

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.contract.audit_log import AuditEntry, ChainHead, Verification

app = typer.Typer(help="List, follow and verify the gateway's audit log.", no_args_is_help=True)


class BrokenAuditLog(FanlightError):
    """Entries were changed, removed, added or put in another order."""

    reason = "AUDIT_LOG_BROKEN"


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many at most, the newest first.")] = 50,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: Annotated[bool, typer.Option("--json", help="Print CloudEvents, one a line.")] = False,
) -> None:
    """List entries, the newest first."""
    from fanlight.cli.output import print_columns, print_json_line
    from fanlight.cli.session import talk
    from fanlight.contract.audit_log import event_of

    found = talk(gateway, lambda client: client.audit_log.list(limit=limit))
    if as_json:
        for entry in found:
            print_json_line(event_of(entry))
    else:
        print_columns(("TIME", "WHO", "FROM", "ACTION", "TARGET", "RESULT", "DETAIL"), [_row(each) for each in found])


@app.command()
def follow(gateway: Gateway = DEFAULT_GATEWAY) -> None:
    """Print entries as they are written: CloudEvents, one a line. Stop it with Ctrl-C."""
    from fanlight.cli.output import print_json_line
    from fanlight.cli.session import talk
    from fanlight.contract.audit_log import event_of

    async def work(client: "AsyncClient") -> None:
        async for entry in client.audit_log.follow():
            print_json_line(event_of(entry))

    talk(gateway, work)


@app.command()
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="CloudEvents, one a line; the gateway's log without.")
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Compare with the heads in this file, then write today's into it. Keep it on another machine.",
        ),
    ] = None,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Check that no entry was changed, removed or put in another order. The exit code is 1 where one was."""
    from fanlight.cli.output import print_json, say
    from fanlight.cli.session import talk
    from fanlight.contract.audit_log import verify as verified

    known = _read_heads(heads) if heads is not None and heads.exists() else []
    if file is not None:
        result = verified(_read_entries(file), known=known)
    else:
        result = talk(gateway, lambda client: client.audit_log.verify(known))
    if as_json:
        print_json(asdict(result))
    else:
        _print(result)
    if result.faults:
        raise BrokenAuditLog(f"the audit log is not whole: {len(result.faults)} faults; the first: {result.faults[0]}")
    if heads is not None:
        heads.write_text(json.dumps([asdict(each) for each in result.heads], indent=1) + "\n")
        say(f"Wrote {len(result.heads)} heads into {heads}.")


def _print(result: "Verification") -> None:
    for fault in result.faults:
        print(f"fault: {fault}")
    for intent in result.open_intents:
        print(f"cut off, or still running: {intent.action} of {intent.target}, {_time(intent)}")
    for head in result.heads:
        print(f"{head.chain}/{head.number}: {head.hash}")
    print(f"{result.entries} entries in {len(result.heads)} chains: {'BROKEN' if result.faults else 'whole'}")


def _read_entries(file: Path) -> "list[AuditEntry]":
    from fanlight.contract.audit_log import entry_of

    found = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(entry_of(json.loads(line)))
        except (ValueError, AttributeError) as error:
            raise InvalidInput(f"{file}, line {number}: {error}") from error
    return found


def _read_heads(file: Path) -> "Sequence[ChainHead]":
    from fanlight.contract.audit_log import ChainHead

    try:
        return [ChainHead(**each) for each in json.loads(_read(file))]
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{file}: has no heads of an audit log: {error}") from error


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file}: cannot be read: {error}") from error


def _row(entry: "AuditEntry") -> tuple[object, ...]:
    actor = entry.actor
    who = f"{actor.role} {actor.key_id or actor.tenant}".strip() or "the gateway"
    result = entry.result if entry.kind.value != "completion" else f"{entry.result} (of {entry.intent})"
    return _time(entry), who, actor.address or "-", entry.action, entry.target, result or "begun", entry.detail or "-"


def _time(entry: "AuditEntry") -> str:
    from fanlight.contract.audit_log import event_of

    return str(event_of(entry)["time"])[:19]
