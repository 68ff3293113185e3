"""What `fanlight` says without a gateway, and what it loads for that."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer

from fanlight.cli import main
from fanlight.cli.main import run


def test_help_loads_no_grpc():
    script = "import sys; from fanlight.cli.main import run; run(['--help']); sys.exit('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "generate" in done.stdout


def test_the_version_is_printed(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fanlight ")


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=main.COMMANDS_GROUP)


@pytest.fixture
def brought(monkeypatch):
    """Commands that services bring."""

    def bring(*entries):
        monkeypatch.setattr(main, "entry_points", lambda group: entries)

    return bring


def test_a_command_of_a_service_runs(brought, capsys):
    brought(entry("orders", "tests.unit.cli.test_help:orders"))

    assert run(["orders", "count"]) == 0
    assert capsys.readouterr().out == "three\n"


def test_help_names_the_commands_of_services_without_loading_them(brought, capsys):
    brought(entry("orders", "there.is.no.such.module:app"))

    assert run(["--help"]) == 0
    assert "orders" in capsys.readouterr().out


def test_a_command_whose_extra_is_missing_says_which(brought, capsys):
    brought(entry("orders", "there.is.no.such.module:app [diffusion]"))

    assert run(["orders", "count"]) == 1
    assert capsys.readouterr().err == (
        "error: `fanlight orders` needs there, which is not installed: pip install 'fanlight[diffusion]'\n"
    )


orders = typer.Typer()


@orders.callback()
def top() -> None:
    pass


@orders.command()
def count() -> None:
    typer.echo("three")
