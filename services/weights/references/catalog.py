"""The catalog: models known without a network, and profiles of them; read from `services/weights/catalog_data/`.

An entry's file with a pinned sha256 may be loaded even if it is a pickle. Models shipped in the `fanlight` package are
never fetched: the MANIFEST.json beside them has their sizes, digests and licenses.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fanlight.errors import FailedPrecondition, NotFound
from services.kernel.files import read_limited
from services.weights.references.manifest import (
    MALFORMED,
    Manifest,
    Packed,
    TensorTable,
    WeightFile,
    file_from_json,
    with_packed,
    with_tables,
)
from services.weights.references.references import AirRef, CatalogRef, HubRef, PackageRef, Reference, parse

PACKAGE = "fanlight"
MANIFEST = "MANIFEST.json"
MAX_CATALOG_BYTES = 256 * 1024 * 1024
NEAR = 6


def packaged_rows(place: str) -> list[dict[str, Any]]:
    """Catalog rows of the files in the package folder `place`, or of the single file that it names."""
    model, _, below = place.partition("/")
    listed = [row for row in _listed(model) if row["path"] == below or row["path"].startswith(f"{below}/")]
    cut = len(below.rpartition("/")[0]) if _is_file(listed, below) else len(below)
    return [
        {**row, "path": row["path"][cut:].lstrip("/"), "sources": [str(PackageRef(path=f"{model}/{row['path']}"))]}
        for row in listed
    ]


def packaged_license(listed: Iterable[Mapping[str, Any]]) -> str:
    """One SPDX expression for all rows."""
    return " AND ".join(sorted({row["license"] for row in listed}))


def packaged_place(manifest: Manifest) -> Path | None:
    """The path of a packaged model: its folder or its only file. None for other models."""
    first = manifest.files[0] if manifest.files else None
    source = parse(first.sources[0]) if first and first.sources else None
    if first is None or not isinstance(source, PackageRef):
        return None
    return packaged_path(source.path if len(manifest.files) == 1 else source.path.removesuffix(f"/{first.path}"))


def packaged_path(path: str) -> Path:
    """The path on this machine of a path relative to the package."""
    return Path(str(files(PACKAGE))) / path


@cache
def _listed(model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(packaged_path(f"{model}/{MANIFEST}").read_text())["files"]
    return found


def _is_file(listed: list[dict[str, Any]], below: str) -> bool:
    return len(listed) == 1 and listed[0]["path"] == below


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """`entries` by name; `aliases`: repository or AIR id to entry name; `profiles`: profile to references."""

    entries: Mapping[str, Manifest] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    profiles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tables: Mapping[str, TensorTable] = field(default_factory=dict)
    # The packed form of files, by sha256.
    packed: Mapping[str, Packed] = field(default_factory=dict)

    def under(self, over: "Catalog") -> "Catalog":
        """This catalog overlaid by another one, which wins where both have a name."""
        return _join(self, over)

    def find(self, reference: Reference) -> Manifest | None:
        """The entry for exactly this reference, or None. A revision other than the pinned one does not match."""
        if isinstance(reference, CatalogRef):
            return self.entries.get(self.aliases.get(reference.name, reference.name))
        if isinstance(reference, HubRef):
            return self._find_repo(reference)
        if isinstance(reference, AirRef):
            return self.entries.get(self.aliases.get(f"{reference.source}:{reference.version}", ""))
        return None

    def _find_repo(self, reference: HubRef) -> Manifest | None:
        alias = f"{reference.repo}/{reference.subfolder}" if reference.subfolder else reference.repo
        entry = self.entries.get(self.aliases.get(alias, ""))
        if entry is None or reference.revision not in ("", "main", entry.revision):
            return None
        return entry

    def expand(self, texts: Iterable[str]) -> list[str]:
        """References with each profile replaced by its contents, in order and without duplicates."""
        out: dict[str, None] = {}
        for text in texts:
            for name in self.profiles.get(text.removeprefix("catalog:"), (text,)):
                out[name] = None
        return list(out)

    def require(self, name: str) -> Manifest:
        entry = self.find(CatalogRef(name=name))
        if entry is None:
            known = sorted([*self.entries, *self.profiles])
            # Closest names first: the error text may be truncated.
            near = get_close_matches(name, known, n=NEAR, cutoff=0.0)
            listed = ", ".join(dict.fromkeys([*near, *known]))
            raise NotFound(f"the catalog has no {name!r}; it has {listed}", field="reference")
        return entry

    def pinned_pickles(self) -> frozenset[str]:
        """sha256 of every pickle that an entry pins."""
        return frozenset(
            f.sha256
            for entry in self.entries.values()
            for f in entry.files
            if f.sha256 and not f.skip and f.path.endswith((".pth", ".pt", ".bin", ".ckpt"))
        )


@cache
def shipped() -> Catalog:
    folder = files("services.weights") / "catalog_data"
    return _merge(json.loads(item.read_text()) for item in sorted(folder.iterdir(), key=str) if _is_json(item.name))


def with_folder(catalog: Catalog, folder: Path) -> Catalog:
    """The catalog overlaid by the operator's catalog files. FailedPrecondition names an unreadable one."""
    if not folder.is_dir():
        raise FailedPrecondition(f"{folder} is not a folder")
    more = Catalog()
    for path in sorted(folder.glob("*.json")):
        try:
            more = _join(more, _merge([json.loads(read_limited(path, MAX_CATALOG_BYTES))]))
        except (*MALFORMED, OSError) as error:
            raise FailedPrecondition(f"{path} is not a catalog file: {error}") from error
    return _join(catalog, more)


def _is_json(name: str) -> bool:
    return name.endswith(".json")


def _join(under: Catalog, over: Catalog) -> Catalog:
    tables, packed = {**under.tables, **over.tables}, {**under.packed, **over.packed}
    entries = {**under.entries, **over.entries}
    return Catalog(
        entries={name: with_packed(with_tables(entry, tables), packed) for name, entry in entries.items()},
        aliases={**under.aliases, **over.aliases},
        profiles={**under.profiles, **over.profiles},
        tables=tables,
        packed=packed,
    )


def catalog_of(document: Mapping[str, Any]) -> Catalog:
    """Parse one catalog file. MALFORMED or FanlightError where it is malformed."""
    return _merge([document])


def _merge(documents: Iterable[Mapping[str, Any]]) -> Catalog:
    entries: dict[str, Manifest] = {}
    aliases: dict[str, str] = {}
    profiles: dict[str, tuple[str, ...]] = {}
    tables: dict[str, TensorTable] = {}
    packed: dict[str, Packed] = {}
    for document in documents:
        for row in document.get("entries", ()):
            entries[row["name"]] = _entry(row)
            aliases.update((alias, row["name"]) for alias in row.get("aliases", ()))
        profiles.update((name, tuple(names)) for name, names in document.get("profiles", {}).items())
        tables.update((sha, TensorTable.from_json(t)) for sha, t in document.get("tensor_tables", {}).items())
        packed.update((sha, Packed.from_json(p)) for sha, p in document.get("packed", {}).items())
    made = Catalog(entries=entries, aliases=aliases, profiles=profiles, tables=tables, packed=packed)
    return _join(Catalog(), made)


def _entry(row: Mapping[str, Any]) -> Manifest:
    """Parse an entry of a catalog file; an entry with `packaged` takes its files from the package's MANIFEST.json."""
    place = row.get("packaged", "")
    listed = packaged_rows(place) if place else row["files"]
    return Manifest(
        reference=f"catalog:{row['name']}",
        view=row["view"],
        files=tuple(_file(data, row) for data in listed),
        revision=row.get("revision", ""),
        license=packaged_license(listed) if place else row.get("license", ""),
        kind=row["kind"],
        family=row.get("family", ""),
        needed_by=tuple(row.get("needed_by", ())),
        caveats=tuple(row.get("caveats", ())),
        is_chosen=bool(place or row.get("is_chosen", False)),
    )


def _file(data: Mapping[str, Any], row: Mapping[str, Any]) -> WeightFile:
    """Parse a file row; without sources of its own, its path is appended to the entry's sources."""
    file = file_from_json(data)
    at = data.get("at", file.path)
    return file if file.sources else replace(file, sources=tuple(_sources(row.get("sources", ()), at)))


def _sources(templates: Iterable[str], at: str) -> Iterator[str]:
    for template in templates:
        source = f"{template}/{at}"
        parse(source)
        yield source
