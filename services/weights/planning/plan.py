"""The plan: which files and which of their tensors are fetched, which are not and why, and how many bytes that is.

Pure: the node's holdings and the repository's manifest are arguments.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.weights.planning.selection import (
    EMA,
    VAE_ENCODER,
    Choice,
    Selection,
    by_part,
    choose,
    is_single_file,
    is_vae,
    part_of_vae,
)
from services.weights.references.manifest import (
    ByteSpan,
    Manifest,
    PackedFrame,
    TensorEntry,
    WeightFile,
    covering,
    merge,
)
from services.weights.references.tensors import component_key

LINK_RATES_MBPS = (25, 100, 300, 1000)
_VARIANT = re.compile(r"\.(fp16|bf16|fp32)(?=\.safetensors$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Contents of a store: files by sha256, sets of tensors by component key, single tensors by sha256."""

    objects: frozenset[str] = frozenset()
    components: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file to appear at `link` in the view.

    `tensors`: the tensors of `file` that it consists of; None: the whole file.
    """

    file: WeightFile
    link: str
    why: str
    size_bytes: int
    held_bytes: int = 0
    tensors: tuple[TensorEntry, ...] | None = None
    # The tensors that must be downloaded.
    missing: tuple[TensorEntry, ...] = ()
    # Whether the original file is rebuilt, byte for byte, from its header and its tensors.
    is_rebuilt: bool = False
    # Frames of the file to download in packed form from a mirror instead: fewer bytes.
    frames: tuple[PackedFrame, ...] = ()

    @property
    def fetch_bytes(self) -> int:
        if self.frames:
            return sum(len(frame.packed) for frame in self.frames)
        return self.size_bytes - self.held_bytes

    @property
    def wanted_spans(self) -> list[ByteSpan]:
        """The bytes of the file that must be downloaded."""
        if self.tensors is None:
            return [ByteSpan(0, self.size_bytes)] if self.fetch_bytes else []
        spans = [ByteSpan(t.begin, t.end) for t in self.missing]
        if self.is_rebuilt:
            assert self.file.tensors is not None
            spans.append(ByteSpan(0, self.file.tensors.header_bytes))
        return merge(spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedBytes:
    path: str
    size_bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """The plan for one manifest.

    `fetch_bytes + held_bytes + skipped_bytes + packed_away_bytes` is the sum of all files in the manifest.
    """

    manifest: Manifest
    files: tuple[PlannedFile, ...]
    skipped: tuple[SkippedBytes, ...] = field(default=())

    @property
    def fetch_bytes(self) -> int:
        return sum(f.fetch_bytes for f in self.files)

    @property
    def held_bytes(self) -> int:
        return sum(f.held_bytes for f in self.files)

    @property
    def packed_away_bytes(self) -> int:
        """Bytes saved because a mirror has the packed form."""
        return sum(f.size_bytes - f.held_bytes - f.fetch_bytes for f in self.files)

    @property
    def skipped_bytes(self) -> int:
        return sum(s.size_bytes for s in self.skipped)


def make_plan(manifest: Manifest, selection: Selection, holdings: Holdings) -> FetchPlan:
    """Plan the files that the selection needs. FailedPrecondition if nothing in the manifest can be loaded."""
    files: list[PlannedFile] = []
    skipped: list[SkippedBytes] = []
    for choice in choose(manifest, selection):
        if choice.is_wanted:
            _plan_file(choice, selection, holdings, files, skipped)
        else:
            skipped.append(SkippedBytes(path=choice.file.path, size_bytes=choice.file.size_bytes, why=choice.why))
    files = [_packed(item) for item in _without_duplicates(files)]
    return FetchPlan(manifest=manifest, files=tuple(files), skipped=tuple(skipped))


def _packed(item: PlannedFile) -> PlannedFile:
    """The file in packed form, if a mirror has that and it is smaller."""
    packed = item.file.packed
    if packed is None or not packed.sources or packed.frames[-1].span.end != item.file.size_bytes:
        return item
    wanted = covering([frame.span for frame in packed.frames], item.wanted_spans)
    frames = tuple(packed.frames[number] for number in wanted)
    if not frames or sum(len(frame.packed) for frame in frames) >= item.fetch_bytes:
        return item
    return replace(item, frames=frames, why=f"{item.why}; packed")


def _plan_file(
    choice: Choice, selection: Selection, holdings: Holdings, files: list[PlannedFile], skipped: list[SkippedBytes]
) -> None:
    file = choice.file
    if file.sha256 in holdings.objects:
        files.append(_whole(choice, held_bytes=file.size_bytes, why="held"))
        return
    if file.tensors is None or not file.tensors.has_digests:
        files.append(_whole(choice, why=choice.why))
        return
    names = [t.name for t in file.tensors.tensors]
    if selection.pipeline and is_single_file(names):
        _plan_parts(choice, selection, holdings, files, skipped)
    elif not selection.encodes and is_vae(names):
        _plan_decoder(choice, holdings, files, skipped)
    else:
        files.append(_rebuilt(choice, holdings))


def _whole(choice: Choice, *, held_bytes: int = 0, why: str) -> PlannedFile:
    file = choice.file
    return PlannedFile(
        file=file, link=plain_link(file.path), why=why, size_bytes=file.size_bytes, held_bytes=held_bytes
    )


def _rebuilt(choice: Choice, holdings: Holdings) -> PlannedFile:
    """A whole file that shares tensors with held files: only the header and the other tensors are downloaded."""
    file = choice.file
    assert file.tensors is not None
    tensors = file.tensors.tensors
    missing = tuple(t for t in tensors if t.sha256 not in holdings.tensors)
    held = sum(t.size_bytes for t in tensors) - sum(t.size_bytes for t in missing)
    if not held:
        return _whole(choice, why=choice.why)
    return PlannedFile(
        file=file,
        link=plain_link(file.path),
        why=f"{choice.why}; {len(tensors) - len(missing)} of its tensors are held",
        size_bytes=file.size_bytes,
        held_bytes=held,
        tensors=tensors,
        missing=missing,
        is_rebuilt=True,
    )


def _plan_parts(
    choice: Choice, selection: Selection, holdings: Holdings, files: list[PlannedFile], skipped: list[SkippedBytes]
) -> None:
    file = choice.file
    assert file.tensors is not None
    unneeded = _unneeded_parts(selection)
    parts = by_part(file.tensors.tensors)
    for part, tensors in parts.items():
        size = sum(t.size_bytes for t in tensors)
        if part in unneeded:
            skipped.append(SkippedBytes(path=f"{file.path}#{part}", size_bytes=size, why=unneeded[part]))
        else:
            files.append(_subset(file, part_link(file.path, part), part.replace("_", " "), tensors, holdings))
    skipped.append(_known_header(file))


def _unneeded_parts(selection: Selection) -> dict[str, str]:
    unneeded = {EMA: "EMA weights, needed only for training"}
    if not selection.encodes:
        unneeded[VAE_ENCODER] = f"{selection.pipeline} encodes no image to latents"
    return unneeded


def _plan_decoder(choice: Choice, holdings: Holdings, files: list[PlannedFile], skipped: list[SkippedBytes]) -> None:
    file = choice.file
    assert file.tensors is not None
    tensors = file.tensors.tensors
    wanted = tuple(t for t in tensors if part_of_vae(t.name) != VAE_ENCODER)
    rest = sum(t.size_bytes for t in tensors) - sum(t.size_bytes for t in wanted)
    files.append(_subset(file, plain_link(file.path), f"{choice.why}; decoder only", wanted, holdings))
    why = "the pipeline encodes no image to latents"
    skipped.append(SkippedBytes(path=f"{file.path}#{VAE_ENCODER}", size_bytes=rest, why=why))
    skipped.append(_known_header(file))


def _known_header(file: WeightFile) -> SkippedBytes:
    assert file.tensors is not None
    return SkippedBytes(
        path=f"{file.path}#header", size_bytes=file.tensors.header_bytes, why="the manifest has the tensors' offsets"
    )


def _subset(file: WeightFile, link: str, why: str, tensors: tuple[TensorEntry, ...], holdings: Holdings) -> PlannedFile:
    size = sum(t.size_bytes for t in tensors)
    is_held = component_key(tensors) in holdings.components
    missing = () if is_held else tuple(t for t in tensors if t.sha256 not in holdings.tensors)
    fetch = sum(t.size_bytes for t in missing)
    return PlannedFile(
        file=file,
        link=link,
        why=f"{why}; held" if is_held else why,
        size_bytes=size,
        held_bytes=size - fetch,
        tensors=tensors,
        missing=missing,
    )


def _without_duplicates(files: Sequence[PlannedFile]) -> Iterable[PlannedFile]:
    """Of several whole files with the same sha256, fetch only the first."""
    seen: set[str] = set()
    for item in files:
        sha = item.file.sha256
        if item.tensors is None and sha and sha in seen and item.fetch_bytes:
            yield _as_duplicate(item)
        else:
            yield item
        if item.tensors is None:
            seen.add(sha)


def _as_duplicate(item: PlannedFile) -> PlannedFile:
    return PlannedFile(
        file=item.file,
        link=item.link,
        why="same bytes as another file of the plan",
        size_bytes=item.size_bytes,
        held_bytes=item.size_bytes,
    )


def plain_link(path: str) -> str:
    """The file name that loaders expect, without a variant; a sharded file keeps its name."""
    return _VARIANT.sub("", path)


def part_link(path: str, part: str) -> str:
    return f"{path.removesuffix('.safetensors')}/{part}.safetensors"


def plan_to_json(plans: Sequence[FetchPlan]) -> dict[str, Any]:
    """The plan as `--json` prints it; the keys are a stable interface."""
    fetch = sum(p.fetch_bytes for p in plans)
    return {
        "references": [p.manifest.reference for p in plans],
        "fetch_bytes": fetch,
        "held_bytes": sum(p.held_bytes for p in plans),
        "skipped_bytes": sum(p.skipped_bytes for p in plans),
        "packed_away_bytes": sum(p.packed_away_bytes for p in plans),
        "seconds": {str(rate): round(fetch * 8 / (rate * 1e6), 1) for rate in LINK_RATES_MBPS},
        "files": [_file_row(plan, item) for plan in plans for item in plan.files],
        "skipped": [{"path": s.path, "bytes": s.size_bytes, "why": s.why} for plan in plans for s in plan.skipped],
        "caveats": [caveat for plan in plans for caveat in plan.manifest.caveats],
    }


def _file_row(plan: FetchPlan, item: PlannedFile) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": item.link,
        "bytes": item.size_bytes,
        "fetch_bytes": item.fetch_bytes,
        "sha256": item.file.sha256,
        "source": item.file.sources[0] if item.file.sources else "",
        "why": item.why,
        "reference": plan.manifest.reference,
    }
    if not item.file.is_exact:
        row["approximate"] = True
    if item.tensors is not None:
        row["of"] = item.file.path
        row["tensors"] = len(item.tensors)
    return row
