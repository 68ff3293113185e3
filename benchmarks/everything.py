"""All benchmarks that fit the machine, one after the other; their figures go to docs/benchmarks.json, and from there
into the tables of docs/benchmarks.md.

What is not run keeps its older figures and their date. `--long` also runs those that take many minutes each.
Run: `python -m benchmarks.everything [--long] [--only NAME ...]`; `make benchmarks` does, `LONG=1` and `ONLY=NAME` too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.commands import COMMANDS, ROOT, Command
from benchmarks.figures import Figure, load

PACKAGES = ("fanlight", "torch", "diffusers", "transformers", "numpy", "grpcio")
LOOP_ROUNDS, LOOP_COUNT = 3, 1_000_000


def reference_loop_s() -> float:
    """A fixed loop's seconds of CPU: how quick one core of this machine is for Python, as it is at this hour."""
    taken = []
    for _ in range(LOOP_ROUNDS):
        begin_s = time.process_time()
        total = 0
        for each in range(LOOP_COUNT):
            total += each * each & 0xFF
        taken.append(time.process_time() - begin_s)
    return round(min(taken), 4)


def surroundings() -> dict[str, Any]:
    """What a figure depends on besides the code that it measures."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "load": round(os.getloadavg()[0], 2),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "loop_s": reference_loop_s(),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """With `+` where files that are tracked differ from it."""
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=ROOT, capture_output=True)
    return (found.stdout.strip() or "unknown") + ("+" if changed.returncode == 1 else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def measured(command: Command) -> dict[str, Any] | None:
    """Its entry in docs/benchmarks.json; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        around = surroundings()
        words = [*command.arguments, *command.options, "--json", str(path)]
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{command.module}", *words], cwd=ROOT)
        if done.returncode or not path.exists():
            return None
        figures = load(path)
    return {"command": command.line(), "measured": around, "figures": [each.to_json() for each in figures]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="also those that take many minutes each")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[each.name for each in COMMANDS], help="such as 'gateway lease'"
    )
    asked = parser.parse_args(argv)
    chosen = [each for each in COMMANDS if (each.name in asked.only if asked.only else asked.long or not each.is_long)]
    failed, missed = [], []
    for command in chosen:
        if reason := command.missing(smoke=False):
            print(f"-- {command.name}: skipped, {reason}", flush=True)
            continue
        print(f"-- {command.name}: {command.line()}", flush=True)
        entry = measured(command)
        if entry is None:
            failed.append(command.name)
            continue
        keep(command.name, entry)
        missed += [
            f"{command.name}: {each.line()}" for each in map(Figure.from_json, entry["figures"]) if each.met is False
        ]
    tables.write()
    print("\n".join([f"{len(missed)} goals missed", *missed]))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def keep(name: str, entry: dict[str, Any]) -> None:
    """In the order of the commands, so that a new measurement changes only its own lines."""
    found = json.loads(tables.FIGURES.read_text()) if tables.FIGURES.exists() else {}
    found[name] = entry
    order = [command.name for command in COMMANDS]
    ordered = {
        each: found[each]
        for each in sorted(found, key=lambda each: (each not in order, order.index(each) if each in order else 0))
    }
    tables.FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
