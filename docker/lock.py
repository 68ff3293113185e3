"""Writes docker/locks/: the exact packages of each layer, by layers.toml and by what is installed beside Python here.

A layer whose packages are not installed here is left as it was written where they are (`make annotators`).

usage: .venv/bin/python docker/lock.py [--check]     exit code 1 with --check where a file is not what it should be
"""

import argparse
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
LOCKS = HERE / "locks"
PROJECT = "fanlight"
HEAD = "# Made by docker/lock.py from layers.toml and constraints.txt.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [name for name, text in locks().items() if not _is_written(LOCKS / f"{name}.txt", text, check=check)]
    for name in stale:
        print(f"docker/locks/{name}.txt is not what layers.toml and constraints.txt say", file=sys.stderr)
    return 1 if stale else 0


def _is_written(path: Path, text: str, *, check: bool) -> bool:
    if check:
        return path.exists() and path.read_text() == text
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return True


def locks() -> dict[str, str]:
    """Layer to the text of its file."""
    described = tomllib.loads((HERE / "layers.toml").read_text())
    pins = _pins(HERE.parent / "constraints.txt")
    held: dict[str, set[str]] = {}
    texts = {}
    for name, layer in described["layers"].items():
        below = set[str]().union(*(held[each] for each in layer.get("below", ())))
        try:
            held[name] = closure(_roots(layer), layer.get("alone", ())) - below - {PROJECT, *described["left_out"]}
        except PackageNotFoundError:
            continue
        texts[name] = HEAD + "".join(f"{each}=={pins[each]}\n" for each in sorted(held[name]))
    return texts


def _roots(layer: Mapping[str, Any]) -> Iterable[Requirement]:
    extras = ",".join(layer.get("extras", ()))
    return [Requirement(name) for name in layer.get("packages", ())] + (
        [Requirement(f"{PROJECT}[{extras}]")] if extras else []
    )


def _pins(path: Path) -> dict[str, str]:
    lines = [line.strip() for line in path.read_text().splitlines()]
    pairs = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pairs}


def closure(roots: Iterable[Requirement], alone: Collection[str] = ()) -> set[str]:
    """The names of all that the roots need on this machine, themselves included; `alone`: whose needs do not count."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(roots)
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key not in seen:
            seen.add(key)
            waiting += [] if wanted.name in alone else _needs(wanted)
    return {name for name, _ in seen}


def _needs(wanted: Requirement) -> list[Requirement]:
    if wanted.name == PROJECT:
        return _of_project(wanted.extras)
    found = [Requirement(line) for line in requires(wanted.name) or ()]
    return [each for each in found if _applies(each, wanted.extras)]


def _of_project(extras: Iterable[str]) -> list[Requirement]:
    """From pyproject.toml itself: an editable install remembers what it said once."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


def _applies(each: Requirement, extras: Iterable[str]) -> bool:
    return each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))


if __name__ == "__main__":
    sys.exit(main())
