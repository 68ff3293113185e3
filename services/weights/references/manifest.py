"""Manifests: the files of a model, pinned by size and digest, and the sources of each. Pure; knows no network."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from fanlight.errors import InvalidField
from services.weights.references.references import is_safe_path

MAX_FILES = 10_000
# More would overflow what sizes are reported as.
MAX_FILE_BYTES = 2**60
MAX_FRAME_BYTES = 64 * 1024 * 1024
# What reading JSON of another form than expected raises.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ByteSpan:
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


def merge(spans: Iterable[ByteSpan]) -> list[ByteSpan]:
    out: list[ByteSpan] = []
    for span in sorted(spans, key=lambda s: s.begin):
        if out and span.begin <= out[-1].end:
            out[-1] = ByteSpan(out[-1].begin, max(out[-1].end, span.end))
        elif len(span):
            out.append(span)
    return out


def covering(frames: Iterable[ByteSpan], wanted: Iterable[ByteSpan]) -> list[int]:
    """Indices of the frames that contain any of the wanted bytes. Both are sorted and do not overlap."""
    spans, found = [span for span in wanted if len(span)], []
    at = 0
    for number, frame in enumerate(frames):
        while at < len(spans) and spans[at].end <= frame.begin:
            at += 1
        if at < len(spans) and spans[at].begin < frame.end:
            found.append(number)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a safetensors file; `begin` and `end` are byte offsets in the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    sha256: str = ""

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    def to_row(self) -> list[Any]:
        return [self.name, self.dtype, list(self.shape), self.begin, self.end, self.sha256]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Self:
        name, dtype, shape, begin, end, sha256 = row
        return cls(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end, sha256=sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """The tensors of one file in byte order; the header is everything before the first one."""

    header_bytes: int
    tensors: tuple[TensorEntry, ...]

    @property
    def has_digests(self) -> bool:
        return bool(self.tensors) and all(t.sha256 for t in self.tensors)

    def to_json(self) -> dict[str, Any]:
        return {"header_bytes": self.header_bytes, "tensors": [t.to_row() for t in self.tensors]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        rows = tuple(TensorEntry.from_row(row) for row in data["tensors"])
        table = cls(header_bytes=int(data["header_bytes"]), tensors=rows)
        table.check()
        return table

    def check(self) -> None:
        """InvalidField unless the tensors are contiguous and their digests well formed."""
        at = self.header_bytes
        for tensor in self.tensors:
            if tensor.begin != at or tensor.end < tensor.begin:
                raise InvalidField(
                    f"tensor {tensor.name!r} does not begin where the previous one ends", field="tensors"
                )
            if tensor.sha256 and not _SHA256.fullmatch(tensor.sha256):
                raise InvalidField(f"tensor {tensor.name!r} has a bad digest", field="tensors")
            at = tensor.end


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDigests:
    """sha256 of every chunk of `chunk_bytes` of a file; the last chunk may be shorter."""

    chunk_bytes: int
    sha256s: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PackedFrame:
    """Bytes of a file and the place of their packed form in the packed file; `sha256` is of the packed form."""

    span: ByteSpan
    packed: ByteSpan
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The packed form of a file, at a mirror; its frames are contiguous in the file and in the packed file."""

    frames: tuple[PackedFrame, ...]
    sources: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return self.frames[-1].packed.end if self.frames else 0

    def to_json(self) -> dict[str, Any]:
        rows = [[len(f.span), len(f.packed), f.sha256] for f in self.frames]
        return {"sources": list(self.sources), "frames": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        frames, at, packed_at = [], 0, 0
        for size, packed_size, sha256 in data["frames"]:
            if not 0 < size <= MAX_FRAME_BYTES or not 0 < packed_size <= 2 * MAX_FRAME_BYTES:
                raise InvalidField(f"a frame of {size} bytes packed into {packed_size}", field="frames")
            if not _SHA256.fullmatch(sha256):
                raise InvalidField("a frame has a bad digest", field="frames")
            frames.append(PackedFrame(ByteSpan(at, at + size), ByteSpan(packed_at, packed_at + packed_size), sha256))
            at, packed_at = at + size, packed_at + packed_size
        return cls(frames=tuple(frames), sources=tuple(data["sources"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file. Where `is_exact` is false, `size_bytes` is an estimate that no check relies on."""

    path: str
    size_bytes: int
    sha256: str = ""
    # In the order of attempts: `hf:ORG/REPO@REVISION/PATH`, `https://...`, `s3://...` or a local path.
    sources: tuple[str, ...] = ()
    is_exact: bool = True
    # The source's own version of this file (an ETag), where the source has no revision for all files.
    version: str = ""
    tensors: TensorTable | None = None
    chunks: ChunkDigests | None = None
    packed: Packed | None = None
    # Why the file is not needed; a file with this set is listed only to be counted as skipped.
    skip: str = ""
    # What its source calls the precision, such as `fp16`, where the manifest's files are the same model.
    precision: str = ""

    def __post_init__(self) -> None:
        if not is_safe_path(self.path):
            raise InvalidField(f"the path {self.path!r} escapes its folder", field="path")
        if not 0 <= self.size_bytes < MAX_FILE_BYTES or (self.sha256 and not _SHA256.fullmatch(self.sha256)):
            raise InvalidField(f"{self.path!r} has a bad size or sha256", field="files")

    @property
    def basename(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The model that a reference resolves to. `view` is its folder in the store, AUTHOR/NAME."""

    reference: str
    view: str
    files: tuple[WeightFile, ...]
    revision: str = ""
    license: str = ""
    kind: str = ""
    family: str = ""
    needed_by: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    # Every listed file is needed, whatever its name: the reference, the operator or the catalog chose it.
    is_chosen: bool = False
    # The files are the same model: the first one is fetched, or the one of the precision that was asked for.
    is_one_of: bool = False

    def __post_init__(self) -> None:
        if not is_safe_path(self.view) or len(self.files) > MAX_FILES:
            raise InvalidField(f"{self.reference!r}: bad folder or more than {MAX_FILES} files", field="reference")

    @property
    def total_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    def to_text(self) -> str:
        return json.dumps(manifest_to_json(self), separators=(",", ":"))


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "reference": manifest.reference,
        "view": manifest.view,
        "revision": manifest.revision,
        "license": manifest.license,
        "kind": manifest.kind,
        "family": manifest.family,
        "needed_by": list(manifest.needed_by),
        "caveats": list(manifest.caveats),
        "is_chosen": manifest.is_chosen,
        **({"is_one_of": True} if manifest.is_one_of else {}),
        "files": [_file_to_json(f) for f in manifest.files],
    }


def _file_to_json(file: WeightFile) -> dict[str, Any]:
    data: dict[str, Any] = {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256}
    data["sources"] = list(file.sources)
    if not file.is_exact:
        data["approximate"] = True
    if file.version:
        data["version"] = file.version
    if file.skip:
        data["skip"] = file.skip
    if file.precision:
        data["precision"] = file.precision
    if file.tensors:
        data["tensors"] = file.tensors.to_json()
    if file.chunks:
        data["chunks"] = {"bytes": file.chunks.chunk_bytes, "sha256": list(file.chunks.sha256s)}
    if file.packed:
        data["packed"] = file.packed.to_json()
    return data


def file_from_json(data: Mapping[str, Any]) -> WeightFile:
    """Parse a file as manifests and catalogs write it. InvalidField says what is malformed."""
    chunks = data.get("chunks")
    try:
        return WeightFile(
            path=data["path"],
            size_bytes=int(data["bytes"]),
            sha256=data.get("sha256") or "",
            sources=tuple(data.get("sources", ())),
            is_exact=not data.get("approximate", False),
            version=data.get("version", ""),
            tensors=TensorTable.from_json(data["tensors"]) if data.get("tensors") else None,
            chunks=ChunkDigests(chunk_bytes=int(chunks["bytes"]), sha256s=tuple(chunks["sha256"])) if chunks else None,
            packed=Packed.from_json(data["packed"]) if data.get("packed") else None,
            skip=data.get("skip", ""),
            precision=data.get("precision", ""),
        )
    except MALFORMED as error:
        raise InvalidField(f"a file of the manifest is malformed: {error!r}", field="files") from error


def manifest_from_json(data: Mapping[str, Any]) -> Manifest:
    try:
        return Manifest(
            reference=data["reference"],
            view=data["view"],
            files=tuple(file_from_json(f) for f in data["files"]),
            revision=data.get("revision", ""),
            license=data.get("license", ""),
            kind=data.get("kind", ""),
            family=data.get("family", ""),
            needed_by=tuple(data.get("needed_by", ())),
            caveats=tuple(data.get("caveats", ())),
            is_chosen=bool(data.get("is_chosen", False)),
            is_one_of=bool(data.get("is_one_of", False)),
        )
    except MALFORMED as error:
        raise InvalidField(f"the manifest is malformed: {error!r}", field="manifest") from error


def with_tables(manifest: Manifest, tables: Mapping[str, TensorTable]) -> Manifest:
    """The manifest with tensor tables added to the files whose sha256 is in `tables`."""
    files = tuple(replace(f, tensors=tables.get(f.sha256)) if f.tensors is None else f for f in manifest.files)
    return replace(manifest, files=files)


def with_packed(manifest: Manifest, packed: Mapping[str, Packed]) -> Manifest:
    """The manifest with packed forms added to the files whose sha256 is in `packed`."""
    return replace(manifest, files=tuple(replace(f, packed=packed.get(f.sha256, f.packed)) for f in manifest.files))
