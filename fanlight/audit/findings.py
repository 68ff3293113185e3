"""Bytes that an image could do without: one function a kind, each from the merged file system to findings."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from .distributions import package_folders
from .libraries import debug_symbols, unlinked_libraries
from .model import Entry, Finding, Image, finding
from .rootfs import RootFs
from .weights import fp32_beside_fp16, pickle_beside_safetensors

# Two small files that happen to be equal are no waste worth a line.
DUPLICATE_BYTES_MIN = 1024
# What lies in the cache of a model hub may be what the service runs.
_MODELS = "huggingface|torch|clip|whisper|modelscope|openai|suno|rembg|insightface|doctr|paddle|keras|tensorflow"
_CACHE = re.compile(
    r"(var/cache/(?:apt|apk|dnf|yum|zypp|pacman|man|debconf)|var/lib/apt/lists"
    rf"|(?:.*/)?\.cache/(?!(?:{_MODELS})/)[^/]+"
    r"|(?:.*/)?\.npm/_cacache|(?:.*/)?\.?(?:conda|miniconda|miniforge|mambaforge|micromamba)\d?/pkgs"
    r"|(?:.*/)?\.?cargo/registry|(?:.*/)?go/pkg/mod/cache|tmp/pip-[^/]+)/"
)
_TESTS = re.compile(
    r"(.*?(?:/(?:site|dist)-packages|/python3[^/]*|(?:^|/)node_modules)/(?:.+?/)??(?:tests?|idle_test))/"
)
_PACKAGE_TESTS = re.compile(r"((?:.+?/)??tests?)/")
# It is called tests, and is what others' programs run.
_NO_TESTS = ("django/test",)
_GIT = re.compile(r"((?:.*/)?(?:\.git|[^/]+\.git(?=/(?:objects|lfs|refs|hooks|info|logs)/)))/")
_DOCS = ("usr/share/doc/", "usr/share/man/", "usr/share/info/", "usr/share/locale/")
_COMPILERS = re.compile(
    r"(?:usr/(?:local/)?)?(?:bin/(?:.*-)?(?:gcc|g\+\+|cc|c\+\+|cpp|cc1|clang|clang\+\+|ld|ld\.bfd|ld\.gold|as)(?:-[\d.]+)?$"
    r"|lib/gcc/.*/(?:cc1|cc1plus|collect2|lto1|lto-wrapper)$|libexec/gcc/)"
)


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
            yield finding("duplicate", entry, f"the same bytes as {first.path}")


def git_objects(image: Image, root: RootFs) -> Iterator[Finding]:
    return _grouped(root, "git objects", lambda path: _first(_GIT, path), "a clone's history is not needed to run")


def lfs_pointers(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if entry.is_lfs_pointer:
            yield finding("LFS pointer", entry, "stands for a file that was never fetched")


def caches(image: Image, root: RootFs) -> Iterator[Finding]:
    return _grouped(root, "cache", lambda path: _first(_CACHE, path), "only an installer reads it")


def tests(image: Image, root: RootFs) -> Iterator[Finding]:
    """Those of Python itself and of packages, also where a package was installed somewhere else."""
    sites = {f"{site}/" if site else "" for site in package_folders(root)}

    def tests_of(path: str) -> str:
        # Licenses keep the places that they had in the sources.
        if ".dist-info/" in path:
            return ""
        found = _first(_TESTS, path)
        for site in sites:
            if not found and path.startswith(site) and (inside := _first(_PACKAGE_TESTS, path.removeprefix(site))):
                found = site + inside
        return "" if found.endswith(_NO_TESTS) else found

    return _grouped(root, "tests", tests_of, "a package's own tests")


def documentation(image: Image, root: RootFs) -> Iterator[Finding]:
    def part(path: str) -> str:
        return next((docs.rstrip("/") for docs in _DOCS if path.startswith(docs)), "")

    return _grouped(root, "documentation", part, "nobody reads it in a container", keep=lambda e: "copyright" in e.path)


def build_tools(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if _COMPILERS.match(entry.path):
            yield finding("build tool", entry, "builds, and does not run, the service")


def static_libraries(image: Image, root: RootFs) -> Iterator[Finding]:
    for entry in root.files():
        if entry.path.endswith(".a") and not entry.path.startswith(("proc/", "sys/")):
            yield finding("static library", entry, "only a linker reads it")


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


def _first(pattern: re.Pattern[str], path: str) -> str:
    found = pattern.match(path)
    return found[1] if found else ""


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
    for each in findings:
        sums[each.kind] += each.size_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
