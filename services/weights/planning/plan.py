"""The plan: which files and which tensors of them are fetched, which are not and why, and how many bytes that is.

Pure: what a node holds and what a repository lists come in as values.
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
    """What a store has: whole files by sha256, sets of tensors by component key, single tensors by sha256."""

    objects: frozenset[str] = frozenset()
    components: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file that will stand at `link` in the view.

    `tensors` are those of `file` that it is made of; None is the whole file, whatever is in it.
    """

    file: WeightFile
    link: str
    why: str
    size_bytes: int
    held_bytes: int = 0
    tensors: tuple[TensorEntry, ...] | None = None
    # Of these tensors, those that must come over the link.
    missing: tuple[TensorEntry, ...] = ()
    # The original file is made again, byte for byte, from its header and its tensors.
    is_rebuilt: bool = False
    # What comes in packed form instead, from a mirror: frames of the file, fewer bytes than what they hold.
    frames: tuple[PackedFrame, ...] = ()

    @property
    def fetch_bytes(self) -> int:
        if self.frames:
            return sum(len(frame.packed) for frame in self.frames)
        return self.size_bytes - self.held_bytes

    @property
    def wanted_spans(self) -> list[ByteSpan]:
        """What of the file must come over the link."""
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
    """What one manifest comes to.

    `fetch_bytes + held_bytes + skipped_bytes + packed_away_bytes` are all bytes that it lists.
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
        """What need not come because a mirror has it in packed form."""
        return sum(f.size_bytes - f.held_bytes - f.fetch_bytes for f in self.files)

    @property
    def skipped_bytes(self) -> int:
        return sum(s.size_bytes for s in self.skipped)


def make_plan(manifest: Manifest, wish: Selection, holdings: Holdings) -> FetchPlan:
    """FailedPrecondition when the manifest has nothing that may be loaded."""
    files: list[PlannedFile] = []
    skipped: list[SkippedBytes] = []
    for choice in choose(manifest, wish):
        if choice.is_wanted:
            _plan_file(choice, wish, holdings, files, skipped)
        else:
            skipped.append(SkippedBytes(path=choice.file.path, size_bytes=choice.file.size_bytes, why=choice.why))
    files = [_packed(item) for item in _without_twins(files)]
    return FetchPlan(manifest=manifest, files=tuple(files), skipped=tuple(skipped))


def _packed(item: PlannedFile) -> PlannedFile:
    """In packed form, where a mirror has it so and that is less."""
    packed = item.file.packed
    if packed is None or not packed.sources or packed.frames[-1].span.end != item.file.size_bytes:
        return item
    wanted = covering([frame.span for frame in packed.frames], item.wanted_spans)
    frames = tuple(packed.frames[number] for number in wanted)
    if not frames or sum(len(frame.packed) for frame in frames) >= item.fetch_bytes:
        return item
    return replace(item, frames=frames, why=f"{item.why}; packed")


def _plan_file(
    choice: Choice, wish: Selection, holdings: Holdings, files: list[PlannedFile], skipped: list[SkippedBytes]
) -> None:
    file = choice.file
    if file.sha256 in holdings.objects:
        files.append(_whole(choice, held_bytes=file.size_bytes, why="held"))
        return
    if file.tensors is None or not file.tensors.has_digests:
        files.append(_whole(choice, why=choice.why))
        return
    names = [t.name for t in file.tensors.tensors]
    if wish.pipeline and is_single_file(names):
        _plan_parts(choice, wish, holdings, files, skipped)
    elif not wish.encodes and is_vae(names):
        _plan_decoder(choice, holdings, files, skipped)
    else:
        files.append(_rebuilt(choice, holdings))


def _whole(choice: Choice, *, held_bytes: int = 0, why: str) -> PlannedFile:
    file = choice.file
    return PlannedFile(
        file=file, link=plain_link(file.path), why=why, size_bytes=file.size_bytes, held_bytes=held_bytes
    )


def _rebuilt(choice: Choice, holdings: Holdings) -> PlannedFile:
    """The whole file, of which some tensors are held in others: only the rest and the header come over the link."""
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
    choice: Choice, wish: Selection, holdings: Holdings, files: list[PlannedFile], skipped: list[SkippedBytes]
) -> None:
    file = choice.file
    assert file.tensors is not None
    unneeded = _unneeded_parts(wish)
    parts = by_part(file.tensors.tensors)
    for part, tensors in parts.items():
        size = sum(t.size_bytes for t in tensors)
        if part in unneeded:
            skipped.append(SkippedBytes(path=f"{file.path}#{part}", size_bytes=size, why=unneeded[part]))
        else:
            files.append(_subset(file, part_link(file.path, part), part.replace("_", " "), tensors, holdings))
    skipped.append(_known_header(file))


def _unneeded_parts(wish: Selection) -> dict[str, str]:
    unneeded = {EMA: "averaged weights, which only training needs"}
    if not wish.encodes:
        unneeded[VAE_ENCODER] = f"{wish.pipeline} turns no picture into latents"
    return unneeded


def _plan_decoder(choice: Choice, holdings: Holdings, files: list[PlannedFile], skipped: list[SkippedBytes]) -> None:
    file = choice.file
    assert file.tensors is not None
    tensors = file.tensors.tensors
    wanted = tuple(t for t in tensors if part_of_vae(t.name) != VAE_ENCODER)
    rest = sum(t.size_bytes for t in tensors) - sum(t.size_bytes for t in wanted)
    files.append(_subset(file, plain_link(file.path), f"{choice.why}; decoder only", wanted, holdings))
    why = "the pipeline turns no picture into latents"
    skipped.append(SkippedBytes(path=f"{file.path}#{VAE_ENCODER}", size_bytes=rest, why=why))
    skipped.append(_known_header(file))


def _known_header(file: WeightFile) -> SkippedBytes:
    assert file.tensors is not None
    return SkippedBytes(
        path=f"{file.path}#header", size_bytes=file.tensors.header_bytes, why="the manifest has the tensors' places"
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


def _without_twins(files: Sequence[PlannedFile]) -> Iterable[PlannedFile]:
    """Of two whole files with one sha256 only the first is fetched."""
    seen: set[str] = set()
    for item in files:
        sha = item.file.sha256
        if item.tensors is None and sha and sha in seen and item.fetch_bytes:
            yield _as_twin(item)
        else:
            yield item
        if item.tensors is None:
            seen.add(sha)


def _as_twin(item: PlannedFile) -> PlannedFile:
    return PlannedFile(
        file=item.file,
        link=item.link,
        why="the same bytes as another file of the plan",
        size_bytes=item.size_bytes,
        held_bytes=item.size_bytes,
    )


def plain_link(path: str) -> str:
    """The name that loaders look for when no variant is asked for; a sharded file keeps its own."""
    return _VARIANT.sub("", path)


def part_link(path: str, part: str) -> str:
    return f"{path.removesuffix('.safetensors')}/{part}.safetensors"


def report(plans: Sequence[FetchPlan]) -> dict[str, Any]:
    """The plan as `--json` writes it; its keys are promised."""
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
