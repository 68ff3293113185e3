"""Looks the locks' packages up in a list of known vulnerabilities.

With --osv the list lies here: a folder, a zip or a file of OSV records (the format of osv.dev's exports for PyPI), and
nothing is asked of a network. Without it `pip-audit` asks PyPI, where it is installed and reachable.

usage: .venv/bin/python docker/vulnerabilities.py [--osv PATH]
exit code 0: none is known; 1: one is known; 2: nothing was looked up
"""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lock
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    id: str
    package: str
    version: str
    summary: str
    locks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({', '.join(self.locks)}): {self.id}: {self.summary}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--osv", type=Path, metavar="PATH", help="OSV records: a folder, a zip or a JSON file")
    asked = parser.parse_args()
    if asked.osv is None:
        return ask_pip_audit()
    records = list(read(asked.osv))
    if not records:
        print(f"error: {asked.osv} has no OSV record", file=sys.stderr)
        return 2
    findings = scan(records)
    for finding in findings:
        print(finding)
    print(f"{len(findings)} known vulnerabilities of {len(_pins())} packages, by {len(records)} records")
    return 1 if findings else 0


def ask_pip_audit() -> int:
    program = shutil.which("pip-audit")
    if program is None:
        print(
            "error: there is no list to look in: install pip-audit (`pipx install pip-audit`) where PyPI can be asked, "
            "or pass --osv with the PyPI export of osv.dev",
            file=sys.stderr,
        )
        return 2
    lists = [part for path in sorted(lock.LOCKS.glob("*.txt")) for part in ("--requirement", str(path))]
    return 1 if subprocess.run([program, "--disable-pip", "--no-deps", *lists], check=False).returncode else 0


def read(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records at the path. ValueError where a file is no JSON."""
    if path.is_dir():
        for each in sorted(path.rglob("*.json")):
            yield from _records(each.read_bytes(), each.name)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield from _records(archive.read(name), name)
    else:
        yield from _records(path.read_bytes(), path.name)


def _records(text: bytes, name: str) -> Sequence[Mapping[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    return found if isinstance(found, list) else [found]


def scan(records: Iterable[Mapping[str, Any]]) -> Sequence[Finding]:
    """What the records say of the packages in docker/locks, but for records that were withdrawn."""
    pins = _pins()
    by_name: dict[str, list[str]] = {}
    for name, version in pins:
        by_name.setdefault(name, []).append(version)
    return [
        Finding(id=record["id"], package=name, version=version, summary=_summary(record), locks=pins[name, version])
        for record in records
        if not record.get("withdrawn")
        for name in sorted(_names(record) & by_name.keys())
        for version in by_name[name]
        if any(_hits(each, name, version) for each in record["affected"])
    ]


def _pins() -> Mapping[tuple[str, str], tuple[str, ...]]:
    """Name and version of each package, and the locks that have it."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for path in sorted(lock.LOCKS.glob("*.txt")):
        for pin in lock.read(path):
            key = (pin.name, pin.version)
            found[key] = (*found.get(key, ()), path.stem)
    return found


def _names(record: Mapping[str, Any]) -> set[str]:
    return {_name(each) for each in record.get("affected", ())}


def _name(affected: Mapping[str, Any]) -> str:
    package = affected.get("package", {})
    return canonicalize_name(package.get("name", "")) if package.get("ecosystem") == "PyPI" else ""


def _hits(affected: Mapping[str, Any], name: str, version: str) -> bool:
    if _name(affected) != name:
        return False
    public = Version(version).public
    if version in affected.get("versions", ()) or public in affected.get("versions", ()):
        return True
    ranges = [each for each in affected.get("ranges", ()) if each["type"] == "ECOSYSTEM"]
    return any(_is_within(each["events"], Version(public)) for each in ranges)


def _is_within(events: Iterable[Mapping[str, str]], version: Version) -> bool:
    """By OSV's rule: the last event at or before the version says whether it is affected."""
    affected = False
    for event, at in sorted((_event(each) for each in events), key=lambda each: each[1]):
        if event == "introduced" and at <= version:
            affected = True
        elif (event == "fixed" and at <= version) or (event == "last_affected" and at < version):
            affected = False
    return affected


def _event(event: Mapping[str, str]) -> tuple[str, Version]:
    (name, text), *_ = event.items()
    try:
        return name, Version(text)
    except InvalidVersion:
        # What is no version of PyPI's never ends a range, and begins it at the beginning.
        return name, Version("0") if name == "introduced" else Version("99999999")


def _summary(record: Mapping[str, Any]) -> str:
    return str(record.get("summary") or record.get("details", "")).partition("\n")[0][:200]


if __name__ == "__main__":
    sys.exit(main())
