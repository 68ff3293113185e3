"""Shared libraries: what of them only a debugger reads, and which of them nothing seems to load."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator

from .model import Entry, Finding, Image, Kind, finding
from .rootfs import RootFs, folder

_DEBUG = (".debug", ".dwo", ".dwp")
_LIBRARY = re.compile(r"lib[^/]*\.so(?:\.\d+)*")
_EXTENSION = re.compile(r"\.(?:cpython|pypy|abi)\d")
# The C library makes up their names from its configuration.
_PLUGINS = re.compile(r"libnss_[^/]*\.so[.\d]*|libpthread\.so\.0|libthread_db\.so\.1")
_VERSION = re.compile(r"(?:\.\d+)+$")


def debug_symbols(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if entry.path.startswith("usr/lib/debug/") or entry.path.endswith(_DEBUG):
            yield finding("debug symbols", entry, "only a debugger reads it")
        elif entry.elf is not None and entry.elf.debug_bytes:
            yield Finding(
                kind="debug symbols",
                path=entry.path,
                size_bytes=entry.elf.debug_bytes,
                why="its .debug_* sections and symbol tables: strip them",
            )


def unlinked_libraries(image: Image, root: RootFs) -> Iterator[Finding]:
    """Candidates, not verdicts: a program may make up a library's name as it runs."""
    wanted = _wanted(root)
    links = _links(root)
    for entry in root.files():
        if not _is_library(entry):
            continue
        soname = entry.elf.soname if entry.elf else ""
        names = {posixpath.basename(entry.path), soname, *links[entry.path]} - {""}
        # A program that names no version takes any.
        names |= {_VERSION.sub("", name) for name in names}
        if not any(wanted[name] - {entry.path} for name in names):
            yield finding("unlinked library", entry, "nothing in the image links to it or names it")


def _is_library(entry: Entry) -> bool:
    name = posixpath.basename(entry.path)
    is_named_so = _LIBRARY.fullmatch(name) and not _EXTENSION.search(name) and not _PLUGINS.fullmatch(name)
    return entry.elf is not None and bool(is_named_so) and not entry.is_python_module


def _wanted(root: RootFs) -> dict[str, set[str]]:
    """Name of a library to whoever links to it or names it."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for entry in root.files():
        for name in entry.mentions | (entry.elf.needed if entry.elf else frozenset()):
            wanted[name].add(entry.path)
    return wanted


def _links(root: RootFs) -> dict[str, set[str]]:
    """File to the names of the links beside it that lead to it, in as many steps as there are."""
    names: dict[str, set[str]] = defaultdict(set)
    for entry in root.entries.values():
        path, seen = entry.path, set[str]()
        while path not in seen and (link := root.entries.get(path)) and link.kind in (Kind.SYMLINK, Kind.HARD_LINK):
            seen.add(path)
            above = folder(path) if link.kind is Kind.SYMLINK else ""
            path = posixpath.normpath(posixpath.join("/", above, link.target)).lstrip("/")
        names[path] |= {posixpath.basename(each) for each in seen}
    return names
