"""Bytes by Python distribution, recognized by the RECORD that installers leave; and by what a path is for."""

import posixpath
import re
from collections import defaultdict
from dataclasses import dataclass

from .layers import normal
from .rootfs import RootFs

_RECORD = re.compile(r"(?P<site>.*)/(?P<name>[^/]+)-(?P<version>[^/-]+)\.dist-info/RECORD")
_SITE = re.compile(r".*/(?:site|dist)-packages/")
WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pt", ".onnx", ".gguf", ".tflite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    name: str
    version: str
    size_bytes: int
    files: int


def distributions(root: RootFs) -> list[Distribution]:
    """The largest first."""
    owners = owners_of(root)
    sizes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for entry in root.files():
        if owner := owners.get(entry.path):
            sizes[owner][0] += entry.size_bytes
            sizes[owner][1] += 1
    found = [
        Distribution(name=name, version=version, size_bytes=size, files=count)
        for (name, version), (size, count) in sizes.items()
    ]
    return sorted(found, key=lambda each: (-each.size_bytes, each.name))


def owners_of(root: RootFs) -> dict[str, tuple[str, str]]:
    """Path to name and version of its distribution, for everything that a RECORD lists and what is compiled of it."""
    recorded = _recorded(root)
    return {entry.path: owner for entry in root.files() if (owner := recorded.get(_source(entry.path)))}


def _recorded(root: RootFs) -> dict[str, tuple[str, str]]:
    return {
        normal(posixpath.join("/", found["site"], path)): (found["name"], found["version"])
        for entry in list(root.files())
        if (found := _RECORD.fullmatch(entry.path))
        for path in entry.record
    }


def package_folders(root: RootFs) -> set[str]:
    """Where distributions were installed."""
    return {found["site"] for entry in root.files() if (found := _RECORD.fullmatch(entry.path))}


def within_site(path: str) -> str:
    """The path below the folder that distributions are installed in, where it is there."""
    return _SITE.sub("", path, count=1)


def _source(path: str) -> str:
    """A compiled file belongs to whoever owns its source: installers do not always record it."""
    folder, name = posixpath.split(path)
    if posixpath.basename(folder) == "__pycache__" and name.endswith(".pyc"):
        return posixpath.join(posixpath.dirname(folder), f"{name.partition('.')[0]}.py")
    return path


def reasons(root: RootFs) -> dict[str, int]:
    """Bytes by what they are there for."""
    sums: dict[str, int] = defaultdict(int)
    owners = owners_of(root)
    for entry in root.files():
        sums[reason_of(entry.path, is_owned=entry.path in owners)] += entry.size_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def reason_of(path: str, *, is_owned: bool) -> str:
    """What a file is there for. `is_owned`: a distribution's RECORD lists it, wherever it was installed."""
    if posixpath.splitext(path)[1] in WEIGHTS:
        return "weights"
    if is_owned or _SITE.match(path):
        return "Python packages"
    if "/python3" in f"/{path}":
        return "Python itself"
    if path.startswith(("var/cache/", "var/lib/apt/", "root/.cache/")):
        return "caches"
    if path.startswith(("usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/")):
        return "documentation"
    return "system"
