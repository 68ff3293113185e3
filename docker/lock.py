"""Writes docker/locks/: the exact packages of each layer, by layers.toml and by what is installed beside Python here.

A layer whose packages are not installed here is left as it was written where they are (`make annotators`). Each package
has the sha256 of its wheel, and pip installs no other; a new one's is asked of the package index.

usage: .venv/bin/python docker/lock.py [--wheels DIR] [--check]
exit code 1 with --check where a file is not what it should be, or a package has no hash
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import lock_index
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
LOCKS = HERE / "locks"
LICENSES = LOCKS / "licenses.json"
PROJECT = "fanlight"
HEAD = "# Made by docker/lock.py from layers.toml and constraints.txt.\n"
_LINE = re.compile(
    r"(?P<name>[a-z0-9-]+)(?P<equals>===?)(?P<version>[^ ]+)(?: --hash=sha256:(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A line of a lock."""

    name: str
    version: str
    # `===` tells 2.13.0 from 2.13.0+cpu, which `==` does not.
    equals: str = "=="
    # Empty: nobody has said it yet, and pip refuses to install the lock.
    sha256: str = ""

    def __str__(self) -> str:
        return self.requirement + (f" --hash=sha256:{self.sha256}" if self.sha256 else "")

    @property
    def requirement(self) -> str:
        return f"{self.name}{self.equals}{self.version}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing and ask no index")
    parser.add_argument("--wheels", type=Path, action="append", default=[], metavar="DIR", help="look here besides")
    asked = parser.parse_args()
    faults = check() if asked.check else write(asked.wheels)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def check() -> Sequence[str]:
    """What is wrong with the locks, a sentence each."""
    made = locks()
    stale = [name for name, pins in made.items() if _requirements(_read(name)) != _requirements(pins)]
    faults = [f"docker/locks/{name}.txt is not what layers.toml and constraints.txt say" for name in stale]
    unhashed = {each for name in names() for each in _read(name) if not each.sha256}
    return faults + [
        f"docker/locks has no hash for {pin.requirement}; run docker/lock.py"
        for pin in sorted(unhashed, key=str)
        if pin.requirement not in _may_lack_hash()
    ]


def _may_lack_hash() -> Collection[str]:
    return set(tomllib.loads((HERE / "layers.toml").read_text())["unhashed"])


def write(folders: Iterable[Path]) -> Sequence[str]:
    """Every lock, with hashes, and the licenses. What could not be found, a sentence each."""
    pins = {**{name: _read(name) for name in names()}, **locks()}
    known = {each.requirement: each.sha256 for name in names() for each in _read(name) if each.sha256}
    licenses = json.loads(LICENSES.read_text()) if LICENSES.exists() else {}
    wanted = {each.requirement: each for many in pins.values() for each in many}
    faults = []
    for batch in batches([each for each in wanted.values() if each.requirement not in known]):
        try:
            found = lock_index.ask([each.requirement for each in batch], folders=folders)
        except CalledProcessError:
            missing = {each.requirement for each in batch} - _may_lack_hash()
            faults += [f"no index has a wheel of {each}; it has no hash" for each in sorted(missing)]
            continue
        for each in batch:
            known[each.requirement] = found[each.name].sha256
            licenses[each.requirement] = found[each.name].license
    for name, many in pins.items():
        path = LOCKS / f"{name}.txt"
        hashed = [replace(each, sha256=known.get(each.requirement, "")) for each in many]
        path.write_text(_head(path) + "".join(f"{each}\n" for each in hashed))
    LICENSES.write_text(json.dumps({key: licenses.get(key, "") for key in sorted(wanted)}, indent=1) + "\n")
    return faults


def batches(pins: Sequence[Pin]) -> Iterable[Sequence[Pin]]:
    """pip takes one version of a name at a time; a build from an index of its own is asked for alone."""
    own = [each for each in pins if "+" in each.version]
    left = [each for each in pins if "+" not in each.version]
    while left:
        batch = {each.name: each for each in reversed(left)}
        yield list(batch.values())
        left = [each for each in left if batch[each.name] != each]
    for each in own:
        yield [each]


def names() -> Sequence[str]:
    return sorted(path.stem for path in LOCKS.glob("*.txt"))


def _read(name: str) -> Sequence[Pin]:
    path = LOCKS / f"{name}.txt"
    return read(path) if path.exists() else ()


def read(path: Path) -> Sequence[Pin]:
    """The pins of a lock. ValueError for a line that is none."""
    pins = []
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if not found:
            raise ValueError(f"{path}: not a pin: {line}")
        pins.append(Pin(**{key: value or "" for key, value in found.groupdict().items()}))
    return pins


def _head(path: Path) -> str:
    if not path.exists():
        return HEAD
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


def _requirements(pins: Iterable[Pin]) -> Sequence[str]:
    return [each.requirement for each in pins]


def locks() -> dict[str, Sequence[Pin]]:
    """Layer to what its file must list; without hashes."""
    described = tomllib.loads((HERE / "layers.toml").read_text())
    pins = _pins(HERE.parent / "constraints.txt")
    held: dict[str, set[str]] = {}
    lists: dict[str, Sequence[Pin]] = {}
    for name, layer in described["layers"].items():
        below = set[str]().union(*(held[each] for each in layer.get("below", ())))
        try:
            held[name] = closure(_roots(layer), layer.get("alone", ())) - below - {PROJECT, *described["left_out"]}
        except PackageNotFoundError:
            continue
        lists[name] = [Pin(name=each, version=pins[each]) for each in sorted(held[name])]
    return lists


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
