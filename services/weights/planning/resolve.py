"""Resolve references to manifests: from the catalog, else from the hub, Civitai, an HTTP server, S3 or the disk."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from fanlight.contract.names import digest_of
from fanlight.errors import FailedPrecondition, FanlightError, InvalidField, NotFound, Unavailable
from services.weights.errors import SourceFailed, TokenRefused
from services.weights.planning.selection import PLAIN_FILE
from services.weights.references.catalog import Catalog, packaged_path
from services.weights.references.manifest import MAX_FILES, Manifest, WeightFile
from services.weights.references.pages import file_addresses
from services.weights.references.references import (
    AirRef,
    CatalogRef,
    HubRef,
    LocalRef,
    PackageRef,
    Reference,
    S3Ref,
    UrlRef,
    is_safe_path,
    parse,
    same_name,
)
from services.weights.settings import WeightsSettings
from services.weights.transfer import s3
from services.weights.transfer.answers import RemoteFile
from services.weights.transfer.pacing import DownloadTools

MAX_LOCAL_FILES = 10_000
_CIVITAI_MODELS = ("Model", "Pruned Model", "VAE", "Negative")


class Resolver:
    def __init__(self, *, tools: DownloadTools, catalog: Catalog, settings: WeightsSettings) -> None:
        self._tools = tools
        self._web = tools.web
        self._catalog = catalog
        self._settings = settings
        self._hub = settings.hf_endpoint
        self._civitai = settings.civitai_endpoint

    async def manifest(self, text: str) -> Manifest:
        """Resolve the reference; errors name it. NotFound, TokenRefused, Unavailable, InvalidField."""
        reference = parse(text)
        entry = self._catalog.find(reference)
        if entry is not None:
            return entry
        try:
            return await self._resolve(reference)
        except FanlightError as error:
            if text in error.message:
                raise
            raise type(error)(f"{text}: {error.message}", field="reference", retry_after_s=error.retry_after_s).of_part(
                error.part
            ) from error

    def add(self, catalog: Catalog) -> None:
        """Add a catalog; existing entries win."""
        self._catalog = catalog.under(self._catalog)

    def is_known(self, text: str) -> bool:
        """Whether it resolves without a network."""
        reference = parse(text)
        return isinstance(reference, LocalRef | PackageRef | CatalogRef) or self._catalog.find(reference) is not None

    async def _resolve(self, reference: Reference) -> Manifest:
        match reference:
            case CatalogRef(name=name):
                return self._catalog.require(name)
            case HubRef():
                return await self._resolve_hub(reference)
            case AirRef(source="civitai"):
                return await self._resolve_civitai(reference)
            case UrlRef(url=url):
                return await self._resolve_url(url)
            case LocalRef(path=path):
                return _local_manifest(local_path(path))
            case PackageRef(path=path):
                return _local_manifest(packaged_path(path))
            case AirRef(source=source):
                raise FailedPrecondition(f"the source {source} is not supported", field="reference")
            case S3Ref():
                return await self._resolve_s3(reference)

    async def _json(self, url: str) -> object:
        data, _ = await self._tools.retry_probe(lambda: self._web.json(url))
        return data

    async def _resolve_hub(self, reference: HubRef) -> Manifest:
        failed: FanlightError | None = None
        for reading in reference.readings():
            try:
                return await self._read_hub(reading)
            except NotFound as error:
                failed = failed or error
        assert failed
        raise failed

    async def _read_hub(self, reference: HubRef) -> Manifest:
        revision = quote(reference.revision or "main", safe="")
        data = await self._json(f"{self._hub}/api/models/{reference.repo}/revision/{revision}?blobs=true")
        if not isinstance(data, dict) or not isinstance(data.get("siblings"), list):
            raise SourceFailed("the hub's response lists no files")
        commit = str(data.get("sha") or reference.revision or "main")
        listed = data["siblings"][: MAX_FILES + 1]
        subfolder = _as_listed(reference.subfolder, listed)
        rows = [row for row in listed if _is_below(row, subfolder)]
        if not rows:
            raise NotFound(f"{reference} has no such folder or file", field="reference")
        return _hub_manifest(reference, subfolder, commit, rows, _license(data))

    async def _resolve_civitai(self, reference: AirRef) -> Manifest:
        version = reference.version or await self._newest_version(reference)
        data = await self._json(f"{self._civitai}/api/v1/model-versions/{version}")
        answer: dict[str, Any] = data if isinstance(data, dict) else {}
        rows = _civitai_files([f for f in answer.get("files") or () if isinstance(f, dict)], reference)
        model = answer.get("model") or {}
        return Manifest(
            reference=str(reference),
            view=f"civitai/{reference.id}-{version}",
            files=tuple(self._civitai_file(row, version, reference) for row in rows),
            revision=str(version),
            kind=str(model.get("type", "")).lower(),
            is_chosen=True,
            is_one_of=len(rows) > 1,
        )

    def _civitai_file(self, row: Mapping[str, Any], version: str, reference: AirRef) -> WeightFile:
        name, size = str(row.get("name", "")), float(row.get("sizeKB") or 0) * 1024
        url, number = str(row.get("downloadUrl", "")), str(row.get("id", ""))
        if not is_safe_path(name) or "/" in name or not url.startswith(("https://", "http://")):
            raise SourceFailed(f"{reference}: the response has an invalid file name or address")
        by_id = (f"{self._civitai}/api/download/models/{version}?fileId={number}",) if number.isdigit() else ()
        sha256 = str((row.get("hashes") or {}).get("SHA256") or "").lower()
        return WeightFile(
            path=name,
            size_bytes=round(size),
            sha256=sha256 if len(sha256) == 64 else "",
            sources=tuple(dict.fromkeys((url, *by_id))),
            is_exact=size > 0 and size == round(size),
            precision=_civitai_precision(row),
        )

    async def _newest_version(self, reference: AirRef) -> str:
        data = await self._json(f"{self._civitai}/api/v1/models/{reference.id}")
        versions = data.get("modelVersions") if isinstance(data, dict) else None
        if not versions or not str(versions[0].get("id", "")).isdigit():
            raise NotFound(f"{reference} has no version", field="reference")
        return str(versions[0]["id"])

    async def _resolve_url(self, url: str) -> Manifest:
        parts = urlsplit(url)
        address, remote = await self._probed_file(url)
        name = unquote(parts.path.rsplit("/", 1)[-1]) or "file"
        name = name if is_safe_path(name) else "file"
        is_known = remote.size_bytes is not None
        file = WeightFile(path=name, size_bytes=remote.size_bytes or 0, sources=(address,), is_exact=is_known)
        folder = digest_of(url.encode()).removeprefix("sha256:")[:12]
        host = (parts.hostname or "host").replace(":", "_")
        return Manifest(
            reference=url,
            view=f"{host}/{folder}",
            files=(file,),
            revision=remote.etag,
            kind=PLAIN_FILE,
            is_chosen=True,
        )

    async def _probed_file(self, url: str) -> tuple[str, RemoteFile]:
        """The address of the file itself, and its metadata."""
        *likely, last = file_addresses(url, hub=self._hub)
        for address in likely:
            with contextlib.suppress(NotFound, SourceFailed, TokenRefused):
                return address, await self._probe(address)
        return last, await self._probe(last)

    async def _probe(self, url: str) -> RemoteFile:
        self._web.guard(url)
        return await self._tools.retry_probe(lambda: self._web.probe_ahead(url))

    async def _resolve_s3(self, reference: S3Ref) -> Manifest:
        if reference.key.endswith("/"):
            return await self._list_s3(reference)
        url = await self.address(str(reference))
        remote = await self._tools.retry_probe(lambda: self._web.probe(url))
        folder, _, name = reference.key.rpartition("/")
        is_known = remote.size_bytes is not None
        file = WeightFile(path=name, size_bytes=remote.size_bytes or 0, sources=(str(reference),), is_exact=is_known)
        view = f"{reference.bucket}/{folder or 'root'}"
        return Manifest(
            reference=str(reference), view=view, files=(file,), revision=remote.etag, kind=PLAIN_FILE, is_chosen=True
        )

    async def _list_s3(self, reference: S3Ref) -> Manifest:
        settings = self._settings
        rows = await s3.listing(reference, endpoint=settings.s3_endpoint, region=settings.s3_region, limit=MAX_FILES)
        if not rows or len(rows) > MAX_FILES:
            what = f"more than {MAX_FILES} objects" if rows else "nothing"
            raise NotFound(f"{reference} has {what} below it", field="reference")
        files = tuple(_s3_file(reference, *row) for row in rows if not row[0].endswith("/"))
        return Manifest(reference=str(reference), view=f"{reference.bucket}/{reference.key.rstrip('/')}", files=files)

    async def address(self, source: str) -> str:
        """The URL to fetch a manifest's source from."""
        match parse(source):
            case HubRef(repo=repo, revision=revision, subfolder=path) if path:
                return f"{self._hub}/{repo}/resolve/{quote(revision or 'main', safe='')}/{quote(path)}"
            case AirRef(source="civitai", version=version) if version:
                return f"{self._civitai}/api/download/models/{version}"
            case UrlRef(url=url):
                return url
            case S3Ref() as reference:
                return await s3.presigned(
                    reference, endpoint=self._settings.s3_endpoint, region=self._settings.s3_region
                )
        raise InvalidField(f"{source!r} is not a source of one file", field="sources")


def _as_listed(subfolder: str, rows: Sequence[Any]) -> str:
    """The subfolder as the hub spells it: an accent may be written in two ways, a blank also as %20."""
    names = {row["rfilename"] for row in rows if _is_below(row, "")} if subfolder else ()
    depth = subfolder.count("/") + 1
    listed = {"/".join(name.split("/")[:depth]) for name in names}
    for wanted in (subfolder, unquote(subfolder)):
        found = wanted if wanted in listed else next((each for each in sorted(listed) if same_name(each, wanted)), "")
        if found:
            return found
    return subfolder


def _is_below(row: Any, subfolder: str) -> bool:
    name = row.get("rfilename") if isinstance(row, dict) else None
    return isinstance(name, str) and (not subfolder or name == subfolder or name.startswith(f"{subfolder}/"))


def _s3_file(folder: S3Ref, key: str, size_bytes: int, etag: str) -> WeightFile:
    return WeightFile(
        path=key.removeprefix(folder.key),
        size_bytes=size_bytes,
        sources=(str(S3Ref(bucket=folder.bucket, key=key)),),
        version=etag,
    )


def _license(data: Mapping[str, Any]) -> str:
    tags = [tag for tag in data.get("tags") or () if isinstance(tag, str) and tag.startswith("license:")]
    return tags[0].removeprefix("license:") if tags else ""


def _hub_manifest(
    reference: HubRef, subfolder: str, commit: str, rows: list[Mapping[str, Any]], license_id: str
) -> Manifest:
    is_file = len(rows) == 1 and rows[0]["rfilename"] == subfolder
    cut = len(subfolder.rpartition("/")[0] if is_file else subfolder)
    view = reference.repo if is_file or not subfolder else f"{reference.repo}/{subfolder}"
    is_default = reference.revision in ("", "main")
    return Manifest(
        reference=str(reference),
        view=view if is_default else f"{view}@{reference.revision.replace('/', '_')}",
        files=tuple(_hub_file(reference.repo, commit, row, cut) for row in rows),
        revision=commit,
        license=license_id,
        is_chosen=is_file,
    )


def _hub_file(repo: str, commit: str, row: Mapping[str, Any], cut: int) -> WeightFile:
    """Parse a file of the hub's list. Only LFS files have a sha256; a path that escapes the folder is refused."""
    name, lfs = row["rfilename"], row.get("lfs") or {}
    size = lfs.get("size", row.get("size"))
    sha256 = str(lfs.get("sha256") or lfs.get("oid") or "").removeprefix("sha256:")
    return WeightFile(
        path=name[cut:].lstrip("/") if cut else name,
        size_bytes=size if isinstance(size, int) else 0,
        sha256=sha256 if len(sha256) == 64 else "",
        sources=(str(HubRef(repo=repo, revision=commit, subfolder=name)),),
        is_exact=isinstance(size, int),
    )


def _civitai_files(rows: Sequence[Mapping[str, Any]], reference: AirRef) -> list[Mapping[str, Any]]:
    """The requested file; else the files of the model, safetensors if there are any, the site's own choice first.

    NotFound where there are none.
    """
    if reference.file_id:
        rows = [row for row in rows if str(row.get("id")) == reference.file_id]
    ending = f".{reference.format}"
    named = [row for row in rows if str(row.get("name", "")).lower().endswith(ending)] if reference.format else []
    models = [row for row in named or rows if row.get("type", "Model") in _CIVITAI_MODELS] or list(named or rows)
    safe = [row for row in models if str(row.get("name", "")).endswith(".safetensors")]
    ranked = sorted(safe or models, key=_civitai_rank)
    if not ranked:
        raise NotFound(f"{reference} has no such file", field="reference")
    # Of a VAE or a negative embedding there is no other precision.
    return [row for row in ranked if row is ranked[0] or (_is_model(row) and _is_model(ranked[0]))]


def _civitai_rank(row: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Sort key: the site's own choice first, then the model before its pruned form and other things."""
    return (not row.get("primary"), row.get("type", "Model") != "Model", not _is_model(row))


def _is_model(row: Mapping[str, Any]) -> bool:
    return row.get("type", "Model") in ("Model", "Pruned Model")


def _civitai_precision(row: Mapping[str, Any]) -> str:
    told = (row.get("metadata") or {}).get("fp") if isinstance(row.get("metadata"), dict) else ""
    return told.lower()[:16] if isinstance(told, str) and told.isalnum() else ""


def local_path(text: str) -> Path:
    return Path(text).expanduser()


def _local_manifest(path: Path) -> Manifest:
    """The manifest of a local file or folder; nothing is downloaded or copied."""
    if path.is_file():
        files = (WeightFile(path=path.name, size_bytes=path.stat().st_size, sources=(str(path.absolute()),)),)
        return Manifest(reference=str(path), view=f"local/{path.name}", files=files, kind=PLAIN_FILE, is_chosen=True)
    if not path.is_dir():
        raise NotFound(f"{path} does not exist", field="reference")
    found = [p for p in sorted(path.rglob("*")) if p.is_file()]
    if len(found) > MAX_LOCAL_FILES:
        raise FailedPrecondition(f"{path} has more than {MAX_LOCAL_FILES} files", field="reference")
    rows = tuple(
        WeightFile(path=p.relative_to(path).as_posix(), size_bytes=p.stat().st_size, sources=(str(p.absolute()),))
        for p in found
    )
    return Manifest(reference=str(path), view=f"local/{path.name or 'root'}", files=rows)


def is_offline(error: FanlightError) -> bool:
    """Whether the source is unreachable, so that an earlier manifest may be used."""
    return isinstance(error, Unavailable)


def with_sha256(manifest: Manifest, sha256: str) -> Manifest:
    """The manifest of one file, pinned to the given digest."""
    wanted = sha256.lower().removeprefix("sha256:")
    if manifest.is_one_of:
        files = [file for file in manifest.files if file.sha256 == wanted] or list(manifest.files)
        manifest = replace(manifest, files=(files[0],), is_one_of=False)
    if len(manifest.files) != 1:
        raise InvalidField(f"{manifest.reference} has more than one file; sha256 needs a single file", field="sha256")
    if len(wanted) != 64 or any(c not in "0123456789abcdef" for c in wanted):
        raise InvalidField(f"{manifest.reference}: the sha256 must be 64 hexadecimal digits", field="sha256")
    file = manifest.files[0]
    if file.sha256 and file.sha256 != wanted:
        raise InvalidField(f"{manifest.reference} is known to have the sha256 {file.sha256}", field="sha256")
    return replace(manifest, files=(replace(file, sha256=wanted),))
