"""Bytes that an image could do without: one function a kind, each from the merged file system to findings."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from audit.model import Entry, Finding, Image, Kind
from audit.rootfs import RootFs, folder

# Two small files that happen to be equal are no waste worth a line.
DUPLICATE_BYTES_MIN = 4096
PICKLES = (".bin", ".ckpt", ".pth", ".pt")
CACHES = (
    "var/cache/apt/",
    "var/lib/apt/lists/",
    "root/.cache/",
    "root/.npm/",
    "var/cache/apk/",
    "var/cache/dnf/",
    "opt/conda/pkgs/",
)
_HOME_CACHE = re.compile(r"home/[^/]+/\.cache/")
_TESTS = re.compile(r"(.*?/(?:site|dist)-packages/(?:.+/)?tests?)/")
_GIT = re.compile(r"((?:.*/)?\.git)/")
_DOCS = ("usr/share/doc/", "usr/share/man/", "usr/share/info/", "usr/share/locale/")
_COMPILERS = re.compile(r"usr/(?:bin/(?:.*-)?(?:gcc|g\+\+|cc1|ld|as)(?:-[\d.]+)?$|lib/gcc/|libexec/gcc/)")
_LIBRARY_NAME = re.compile(r"lib[^/]*\.so(?:\.\d+)*$")


def hidden(image: Image, root: RootFs) -> Iterator[Finding]:
    for each in root.hidden:
        kind = "deleted" if each.is_deleted else "overwritten"
        verb = "deletes" if each.is_deleted else "replaces"
        yield Finding(
            kind=kind,
            path=each.entry.path,
            size_bytes=each.entry.size_bytes,
            why=f"layer {each.layer + 1} ships it, layer {each.by + 1} {verb} it",
        )


def duplicates(image: Image, root: RootFs) -> Iterator[Finding]:
    by_content: dict[str, list[Entry]] = defaultdict(list)
    for entry in root.files():
        if entry.size_bytes >= DUPLICATE_BYTES_MIN:
            by_content[entry.sha256].append(entry)
    for same in by_content.values():
        first, *others = sorted(same, key=lambda entry: entry.path)
        for entry in others:
            yield _finding("duplicate", entry, f"the same bytes as {first.path}")


def fp32_beside_fp16(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        stem, extension = posixpath.splitext(entry.path)
        half = root.entries.get(f"{stem}.fp16{extension}")
        if half is not None and half.kind is Kind.FILE:
            yield _finding("fp32 beside fp16", entry, f"{posixpath.basename(half.path)} lies beside it")


def pickle_beside_safetensors(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        stem, extension = posixpath.splitext(entry.path)
        if extension in PICKLES:
            for safe in (f"{stem}.safetensors", posixpath.join(folder(entry.path), "model.safetensors")):
                if safe in root.entries and (safe == f"{stem}.safetensors" or stem.endswith("pytorch_model")):
                    yield _finding("pickle beside safetensors", entry, f"{posixpath.basename(safe)} lies beside it")
                    break


def git_objects(image: Image, root: RootFs) -> Iterator[Finding]:
    return _grouped(root, "git objects", lambda path: _first(_GIT, path), "a clone's history is not needed to run")


def lfs_pointers(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if entry.is_lfs_pointer:
            yield _finding("LFS pointer", entry, "stands for a file that was never fetched")


def caches(image: Image, root: RootFs) -> Iterator[Finding]:
    def cache_of(path: str) -> str:
        found = next((cache for cache in CACHES if path.startswith(cache)), "")
        return (found or _first(_HOME_CACHE, path, 0)).rstrip("/")

    return _grouped(root, "cache", cache_of, "only an installer reads it")


def tests(image: Image, root: RootFs) -> Iterator[Finding]:
    return _grouped(root, "tests", lambda path: _first(_TESTS, path), "a package's own tests")


def documentation(image: Image, root: RootFs) -> Iterator[Finding]:
    def part(path: str) -> str:
        return next((docs.rstrip("/") for docs in _DOCS if path.startswith(docs)), "")

    return _grouped(root, "documentation", part, "nobody reads it in a container", keep=lambda e: "copyright" in e.path)


def build_tools(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if _COMPILERS.match(entry.path):
            yield _finding("build tool", entry, "builds, and does not run, the service")


def static_libraries(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if entry.path.endswith(".a") and not entry.path.startswith(("proc/", "sys/")):
            yield _finding("static library", entry, "only a linker reads it")


def debug_symbols(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if entry.path.startswith("usr/lib/debug/") or entry.path.endswith(".debug"):
            yield _finding("debug symbols", entry, "only a debugger reads it")
        elif entry.elf is not None and entry.elf.debug_bytes:
            yield Finding(
                kind="debug symbols",
                path=entry.path,
                size_bytes=entry.elf.debug_bytes,
                why="its .debug_* sections: strip them",
            )


def unlinked_libraries(image: Image, root: RootFs) -> Iterator[Finding]:
    """Candidates, not verdicts: a program may make up a library's name as it runs."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for entry in root.files():
        for name in entry.mentions | (entry.elf.needed if entry.elf else frozenset()):
            wanted[name].add(entry.path)
    for entry in root.files():
        if entry.elf is None or not _LIBRARY_NAME.search(entry.path):
            continue
        names = {posixpath.basename(entry.path), entry.elf.soname} - {""}
        if not any(wanted[name] - {entry.path} for name in names):
            yield _finding("unlinked library", entry, "nothing in the image links to it or names it")


KINDS: tuple[Callable[[Image, RootFs], Iterator[Finding]], ...] = (
    hidden,
    duplicates,
    fp32_beside_fp16,
    pickle_beside_safetensors,
    git_objects,
    lfs_pointers,
    caches,
    tests,
    documentation,
    build_tools,
    static_libraries,
    debug_symbols,
    unlinked_libraries,
)


def find(image: Image, root: RootFs) -> list[Finding]:
    """The fix list: what saves most comes first."""
    found = [finding for kind in KINDS for finding in kind(image, root)]
    return sorted(found, key=lambda finding: (-finding.size_bytes, finding.kind, finding.path))


def _finding(kind: str, entry: Entry, why: str) -> Finding:
    return Finding(kind=kind, path=entry.path, size_bytes=entry.size_bytes, why=why)


def _first(pattern: re.Pattern[str], path: str, group: int = 1) -> str:
    found = pattern.match(path)
    return found[group] if found else ""


def _grouped(
    root: RootFs,
    kind: str,
    group_of: Callable[[str], str],
    why: str,
    keep: Callable[[Entry], bool] = lambda entry: False,
) -> Iterator[Finding]:
    """One finding for each folder that `group_of` names."""
    sums: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for entry in root.files():
        group = group_of(entry.path)
        if group and not keep(entry):
            sums[group] += entry.size_bytes
            counts[group] += 1
    for group, size_bytes in sums.items():
        yield Finding(kind=kind, path=group, size_bytes=size_bytes, why=f"{why}; files: {counts[group]}")


def by_kind(findings: Iterable[Finding]) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for finding in findings:
        sums[finding.kind] += finding.size_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
