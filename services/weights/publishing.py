"""Held models written to a mirror: each file once, packed where that is smaller, and a catalog that says what is there.

A mirror is a folder that any HTTP server can serve, or a place in S3; other nodes name it in FANLIGHT_WEIGHTS_MIRRORS.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.kernel.logs import get_logger
from services.weights.chunks import Span
from services.weights.errors import WrongBytes
from services.weights.manifest import Frame, Packed, TensorTable
from services.weights.objects import Objects
from services.weights.packing import blocks_of, pack

log = get_logger()

CATALOG_FILE = "catalog.json"
# Where a mirror keeps what a catalog's relative source names.
HERE = "./"


class Destination(Protocol):
    """Where a mirror is written. Blocking."""

    def read(self, name: str) -> bytes | None: ...

    def has(self, name: str, size_bytes: int) -> bool: ...

    def put(self, name: str, path: Path) -> None:
        """Keep a copy of the file under the name, whole or not at all."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """`size_bytes` of the models stand at the mirror as `mirror_bytes`, of which `written_bytes` are new there."""

    names: tuple[str, ...]
    size_bytes: int
    mirror_bytes: int
    written_bytes: int


def publish(objects: Objects, names: Sequence[str], to: Destination) -> Published:
    """Write these models and add them to the mirror's catalog. NotFound, WrongBytes for a damaged object."""
    work = _Publishing(objects, to)
    document: dict[str, Any] = {"entries": [], "packed": {}, "tensor_tables": {}}
    for name in names:
        document["entries"].append(work.model(name, document))
    _add_to_catalog(to, document, objects.parts / "publish-catalog.part")
    return Published(
        names=tuple(row["name"] for row in document["entries"]),
        size_bytes=work.size_bytes,
        mirror_bytes=work.mirror_bytes,
        written_bytes=work.written_bytes,
    )


class _Publishing:
    def __init__(self, objects: Objects, to: Destination) -> None:
        self._objects = objects
        self._to = to
        self.size_bytes = self.mirror_bytes = self.written_bytes = 0

    def model(self, name: str, document: dict[str, Any]) -> dict[str, Any]:
        """The catalog's entry for a view of the store; its files are at the mirror then."""
        with self._objects.using(self._objects.objects_of(name)):
            links = [(link, sha) for view, link, sha in self._objects.index.links() if view == name]
            links = links or [(f"{sha}.safetensors", sha) for sha in self._objects.objects_of(name)]
            files = [self._file(link, sha, document) for link, sha in links]
        log.info("weights_published", name=name, files=len(files))
        return {"name": entry_name(name), "view": name, "kind": "", "is_chosen": True, "files": files}

    def _file(self, link: str, sha: str, document: dict[str, Any]) -> dict[str, Any]:
        path = self._objects.path_of(sha)
        size, table = path.stat().st_size, self._objects.index.table(sha)
        self.size_bytes += size
        row = {"path": link, "bytes": size, "sha256": sha, "sources": []}
        packed = self._packed(path, sha, table) if table else None
        if packed is not None and table is not None:
            document["packed"][sha] = packed.to_json()
            document["tensor_tables"][sha] = table.to_json()
        else:
            self._put(sha, path)
            row["sources"] = [HERE + sha]
        return row

    def _packed(self, path: Path, sha: str, table: TensorTable) -> Packed | None:
        """The packed form, at the mirror; None where that would not be smaller."""
        part = self._objects.parts / f"publish-{sha}.part"
        try:
            frames = pack_file(path, sha, table, part)
            packed = Packed(frames=frames, sources=(f"{HERE}{sha}.packed",))
            if packed.size_bytes >= path.stat().st_size:
                return None
            self._put(f"{sha}.packed", part)
            return packed
        finally:
            part.unlink(missing_ok=True)

    def _put(self, name: str, path: Path) -> None:
        size = path.stat().st_size
        self.mirror_bytes += size
        if not self._to.has(name, size):
            self.written_bytes += size
            self._to.put(name, path)


def pack_file(path: Path, sha256: str, table: TensorTable | None, out: Path) -> tuple[Frame, ...]:
    """Write the packed form of the file at `out`. WrongBytes when the file is not what its name says."""
    frames, at, digest = [], 0, hashlib.sha256()
    with path.open("rb") as source, out.open("wb") as target:
        for block in blocks_of(path.stat().st_size, table):
            data = source.read(len(block.span))
            digest.update(data)
            packed = pack(data, block.width)
            target.write(packed)
            frames.append(Frame(block.span, Span(at, at + len(packed)), hashlib.sha256(packed).hexdigest()))
            at += len(packed)
    if digest.hexdigest() != sha256:
        raise WrongBytes(f"the object {sha256[:12]} is damaged; run verify")
    return tuple(frames)


def entry_name(view: str) -> str:
    """A view as a name of the catalog: `org/Model_1` is `org-model_1`."""
    return re.sub(r"[^a-z0-9._-]", "-", view.lower()).strip("-._")[:64]


def _add_to_catalog(to: Destination, document: Mapping[str, Any], part: Path) -> None:
    old = json.loads(to.read(CATALOG_FILE) or b"{}")
    fresh = {row["name"] for row in document["entries"]}
    kept = [row for row in old.get("entries", ()) if row["name"] not in fresh]
    merged = {
        "entries": [*kept, *document["entries"]],
        "packed": {**old.get("packed", {}), **document["packed"]},
        "tensor_tables": {**old.get("tensor_tables", {}), **document["tensor_tables"]},
    }
    part.write_text(json.dumps(merged, separators=(",", ":")))
    try:
        to.put(CATALOG_FILE, part)
    finally:
        part.unlink(missing_ok=True)
