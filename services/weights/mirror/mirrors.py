"""Mirrors: publishing held models to one, and reading mirrors' catalogs.

A mirror is a folder that any HTTP server can serve, or a prefix in S3; nodes list it in FANLIGHT_WEIGHTS_MIRRORS. It
has each file once, packed if that is smaller, and a catalog. A mirror adds forms and sources of files named by sha256,
and models of its own; it never allows a pickle. Knows of the store only what publishing asks of it.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from fanlight.errors import FanlightError, InvalidField
from services.kernel.files import read_limited
from services.kernel.logs import get_logger
from services.weights.errors import SourceFailed
from services.weights.mirror.packing import pack_file
from services.weights.planning.resolve import local_path
from services.weights.planning.selection import PICKLES
from services.weights.references.catalog import MAX_CATALOG_BYTES, Catalog, catalog_of
from services.weights.references.manifest import MALFORMED, Packed, TensorTable
from services.weights.references.references import LocalRef, S3Ref, parse
from services.weights.settings import WeightsSettings
from services.weights.transfer import s3
from services.weights.transfer.partial import sync
from services.weights.transfer.web import Web

log = get_logger()

CATALOG_FILE = "catalog.json"
# How much of an error is logged, which may quote the mirror's catalog.
WHY_LIMIT = 500
# Prefix of a catalog's sources that are relative to the mirror.
HERE = "./"
T = TypeVar("T")


class Destination(Protocol):
    """A place to write a mirror to. Blocking."""

    def read(self, name: str) -> bytes | None: ...

    def has(self, name: str, size_bytes: int) -> bool: ...

    def put(self, name: str, path: Path) -> None:
        """Copy the file to the name, atomically."""
        ...


class PublishedObjects(Protocol):
    """What publishing asks of a store's objects. Blocking."""

    @property
    def parts(self) -> Path: ...

    def path_of(self, sha256: str) -> Path: ...

    def table_of(self, sha256: str) -> TensorTable | None: ...

    def links_of(self, name: str) -> list[tuple[str, str]]: ...

    def using(self, shas: Iterable[str]) -> contextlib.AbstractContextManager[bool]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The models' `size_bytes` take `mirror_bytes` at the mirror, of which `written_bytes` are new."""

    names: tuple[str, ...]
    size_bytes: int
    mirror_bytes: int
    written_bytes: int


def publish(objects: PublishedObjects, names: Sequence[str], to: Destination) -> Published:
    """Write these models to the mirror and add them to its catalog. NotFound; WrongBytes for a damaged object."""
    work = _Publisher(objects, to)
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


class _Publisher:
    def __init__(self, objects: PublishedObjects, to: Destination) -> None:
        self._objects = objects
        self._to = to
        self.size_bytes = self.mirror_bytes = self.written_bytes = 0

    def model(self, name: str, document: dict[str, Any]) -> dict[str, Any]:
        """Write a view's files to the mirror; returns its catalog entry."""
        links = self._objects.links_of(name)
        with self._objects.using(sha for _, sha in links):
            files = [self._file(link, sha, document) for link, sha in links]
        log.info("weights_published", name=name, files=len(files))
        return {"name": entry_name(name), "view": name, "kind": "", "is_chosen": True, "files": files}

    def _file(self, link: str, sha: str, document: dict[str, Any]) -> dict[str, Any]:
        path = self._objects.path_of(sha)
        size, table = path.stat().st_size, self._objects.table_of(sha)
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
        """Write the packed form to the mirror; None if it is not smaller."""
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


def entry_name(view: str) -> str:
    """The catalog name of a view: `org/Model_1` becomes `org-model_1`."""
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


class FolderDestination:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    def has(self, name: str, size_bytes: int) -> bool:
        path = self._folder / name
        return path.is_file() and path.stat().st_size == size_bytes

    def put(self, name: str, path: Path) -> None:
        fresh = self._folder / f".{name}.part"
        shutil.copyfile(path, fresh)
        sync(fresh)
        fresh.rename(self._folder / name)
        sync(self._folder)


class S3Destination:
    """Below s3://BUCKET/KEY. Called off the event loop; its requests run on `loop`."""

    def __init__(self, place: S3Ref, settings: WeightsSettings, loop: asyncio.AbstractEventLoop) -> None:
        self._place = place
        self._settings = settings
        self._loop = loop

    def _at(self, name: str) -> S3Ref:
        return S3Ref(bucket=self._place.bucket, key=f"{self._place.key.rstrip('/')}/{name}")

    def _do(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        work = call(*arguments, endpoint=self._settings.s3_endpoint, region=self._settings.s3_region)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def read(self, name: str) -> bytes | None:
        return self._do(s3.read, self._at(name))

    def has(self, name: str, size_bytes: int) -> bool:
        return self._do(s3.size_of, self._at(name)) == size_bytes

    def put(self, name: str, path: Path) -> None:
        self._do(s3.upload, self._at(name), path)


def destination(text: str, settings: WeightsSettings, loop: asyncio.AbstractEventLoop) -> Destination:
    """Parse the place of a mirror: a path or s3://BUCKET/PREFIX."""
    match parse(text):
        case LocalRef(path=path):
            return FolderDestination(local_path(path))
        case S3Ref() as place:
            return S3Destination(place, settings, loop)
    raise InvalidField(f"{text!r} must be a path such as ./mirror, or s3://BUCKET/PREFIX", field="to")


async def read_mirrors(
    bases: Sequence[str],
    *,
    web: Web,
    address: Callable[[str], Awaitable[str]],
    cache: Path,
    is_offline: bool,
) -> Catalog:
    """All mirrors' catalogs combined. One that is unreachable or malformed is logged and left out.

    Catalogs are cached in the folder `cache` and used from there if the mirror cannot be reached.
    """
    found = Catalog()
    for base in reversed(bases):
        try:
            text = await _text(base, web, address, cache, is_offline=is_offline)
            found = found.under(catalog_of(_local(json.loads(text), base)))
        except (FanlightError, OSError, *MALFORMED) as error:
            log.warning("weights_mirror_unreadable", mirror=base.split("?")[0], why=str(error)[:WHY_LIMIT])
    return found


async def _text(
    base: str, web: Web, address: Callable[[str], Awaitable[str]], cache: Path, *, is_offline: bool
) -> bytes:
    kept = cache / f"mirror-{hashlib.sha256(base.encode()).hexdigest()[:16]}.json"
    if is_offline:
        return read_limited(kept, MAX_CATALOG_BYTES)
    try:
        body, _ = await web.body(await address(f"{base}/{CATALOG_FILE}"), limit_bytes=MAX_CATALOG_BYTES)
        _refuse_page(body, base)
    except FanlightError:
        if not kept.exists():
            raise
        return read_limited(kept, MAX_CATALOG_BYTES)
    # Without the copy, as on a disk that is full or read-only, the mirror is needed next time.
    with contextlib.suppress(OSError):
        fresh = kept.with_suffix(".part")
        fresh.write_bytes(body)
        fresh.rename(kept)
    return body


def _refuse_page(body: bytes, base: str) -> None:
    """A page to log in at, or an error, must not replace the catalog that was read last."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not {"entries", "packed"} & set(document):
        host = urlsplit(base).hostname or base
        raise SourceFailed(
            f"{host} answers with something that is no mirror's catalog: does one have to log in to this network first?"
        ).of_part(f"source:{host}")


def _local(document: dict[str, Any], base: str) -> dict[str, Any]:
    """The mirror's catalog with absolute sources, and without pickles."""
    entries = [row for row in document.get("entries", ()) if not _has_pickle(row)]
    for row in entries:
        for file in row["files"]:
            file["sources"] = [_whole(source, base) for source in file.get("sources", ())]
    packed = document.get("packed", {})
    for row in packed.values():
        row["sources"] = [_whole(source, base) for source in row["sources"]]
    return {"entries": entries, "packed": packed, "tensor_tables": document.get("tensor_tables", {})}


def _has_pickle(entry: dict[str, Any]) -> bool:
    return any(file["path"].endswith(PICKLES) for file in entry["files"])


def _whole(source: str, base: str) -> str:
    return f"{base}/{source.removeprefix(HERE)}" if source.startswith(HERE) else source
