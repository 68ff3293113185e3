"""The command `fanlight`: its commands, those that services add, and the exit codes."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer

from fanlight import __version__
from fanlight.cli import audit_log, jobs, keys, nodes, records, tenants
from fanlight.cli.audit import AS_THEY_ARE, audit
from fanlight.cli.catalog import annotators, models, workers
from fanlight.cli.generate import annotate, generate
from fanlight.cli.session import MissingExtra
from fanlight.cli.up import up
from fanlight.errors import FanlightError, InvalidInput

# Entry points of commands that services bring: typer apps, each registered with the extra that it needs.
COMMANDS_GROUP = "fanlight.commands"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# The common base of what typer raises for a wrong command line, whichever click it carries.
_UsageError: Any = typer.BadParameter.__mro__[1]


def build(*, wanted: str | None = None) -> typer.Typer:
    """`wanted` is the command that will run, where that is known."""
    app = typer.Typer(
        help="Stable Diffusion with ControlNet, served stage by stage from many small machines.",
        add_completion=False,
        no_args_is_help=True,
    )
    app.callback()(_top)
    app.command()(up)
    app.command()(generate)
    app.command()(annotate)
    app.add_typer(jobs.app, name="jobs")
    app.add_typer(jobs.dead_app, name="dead")
    app.add_typer(nodes.app, name="nodes")
    app.add_typer(keys.app, name="keys")
    app.add_typer(tenants.app, name="tenants")
    app.add_typer(audit_log.app, name="audit-log")
    app.add_typer(records.app, name="records")
    for command in (annotators, models, workers):
        app.command()(command)
    # The audit and `python -m fanlight.health` take the options themselves; containers' probes call the latter.
    app.command(add_help_option=False, context_settings=AS_THEY_ARE)(audit)
    app.command(add_help_option=False, context_settings=AS_THEY_ARE)(health)
    add_commands(app, wanted=wanted)
    return app


def health(context: typer.Context) -> int:
    """Check whether a gRPC server is serving, and print its state."""
    from fanlight.health import main as check

    return check(context.args)


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"fanlight {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Runs one command; the exit code. 1: it failed, 2: the command line is wrong, 130: Ctrl-C."""
    as_json = "--json" in arguments
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        code = build(wanted=wanted)(list(arguments), standalone_mode=False, prog_name="fanlight")
        return code if isinstance(code, int) else 0
    except FanlightError as error:
        return _fail(error, EXIT_FAILED, as_json=as_json)
    except _UsageError as error:
        text = _usage(error)
        return _fail(InvalidInput(text), EXIT_USAGE, as_json=as_json) if text else EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output closed it, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _usage(error: Any) -> str:
    """One line; empty where the help was printed instead."""
    text = " ".join(error.format_message().split()).replace("Value error, ", "")
    return f"{text.rstrip('.')}; see `{error.ctx.command_path} --help`" if text and error.ctx else text


def _fail(error: FanlightError, code: int, *, as_json: bool) -> int:
    from fanlight.cli.output import print_error

    print_error(error, as_json=as_json)
    return code


def add_commands(app: typer.Typer, *, wanted: str | None) -> None:
    """Loads only the command that will run; the help lists the others by name, so that it stays quick."""
    for entry in sorted(entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name):
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
    assert isinstance(loaded, typer.Typer), f"{entry.value} is not a typer app"
    return loaded


def _never() -> None:
    raise AssertionError("the command that runs was loaded")


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
