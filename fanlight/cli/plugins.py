"""Commands that services bring, through the entry-point group `fanlight.commands`.

Each entry is a typer app; the extra it is registered with is the one to install when it does not load.
"""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

import typer

from fanlight.errors import FanlightError

GROUP = "fanlight.commands"


class MissingExtra(FanlightError):
    """A part of Fanlight that is not installed here."""

    code = "UNIMPLEMENTED"

    def __init__(self, what: str, extras: Iterable[str], missing: str) -> None:
        names = ",".join(extras) or "all"
        super().__init__(f"{what} needs {missing}, which is not installed: pip install 'fanlight[{names}]'")


def add_commands(app: typer.Typer, *, wanted: str | None) -> None:
    """Loads the one that is wanted; the others only lend their names to the help, so that it stays quick."""
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name == wanted:
            app.add_typer(_load(entry), name=entry.name)
        else:
            app.command(entry.name, help=f"More with `fanlight {entry.name} --help`.")(_never)


def _load(entry: EntryPoint) -> typer.Typer:
    try:
        loaded = entry.load()
    except ImportError as error:
        missing = error.name or str(error)
        raise MissingExtra(f"`fanlight {entry.name}`", entry.extras, missing) from error
    assert isinstance(loaded, typer.Typer), f"{entry.value} is no typer app"
    return loaded


def _never() -> None:
    raise AssertionError("the wanted command was loaded")
