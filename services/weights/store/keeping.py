"""From downloaded bytes to objects in the store: whole files, files composed of tensors, checkpoints split into parts.

Blocking; every byte is verified; knows no network.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fanlight.errors import Conflict
from services.kernel.logs import get_logger
from services.weights.errors import DiskFull, WrongBytes
from services.weights.planning.plan import FetchPlan, Holdings, PlannedFile, make_plan
from services.weights.planning.selection import PLAIN_FILE, Selection, is_single_file
from services.weights.references.manifest import ByteSpan, TensorEntry, TensorTable
from services.weights.references.tensors import (
    READ_BYTES,
    BadHeader,
    Digested,
    FileDigests,
    canonical_header,
    component_key,
)
from services.weights.store.objects import Objects
from services.weights.transfer.download import SpanDigest
from services.weights.transfer.partial import Layout, layout_of_spans

log = get_logger()

# A path in a view, and the sha256 of its object.
Link = tuple[str, str]


def missing_layout(item: PlannedFile) -> Layout:
    """The parts of the source to download for the file: its missing tensors, and its header if it is rebuilt."""
    assert item.tensors is not None
    return layout_of_spans(item.wanted_spans)


def missing_digests(item: PlannedFile, layout: Layout) -> tuple[SpanDigest, ...]:
    return tuple(
        SpanDigest(span=ByteSpan(at, at + t.size_bytes), sha256=t.sha256)
        for t in item.missing
        if t.size_bytes
        for at in [layout.to_download(t.begin)]
    )


def compose(objects: Objects, item: PlannedFile, packed: Path | None, layout: Layout, out: Path) -> Digested:
    """Compose the file at `out`. Conflict if a held tensor was evicted; WrongBytes if one is damaged."""
    assert item.tensors is not None
    missing = {t.name for t in item.missing}
    header, table = _header(item, packed, layout)
    digest, body = hashlib.sha256(header), hashlib.sha256()
    with out.open("wb") as target:
        target.write(header)
        for tensor in _in_order(item.tensors, table):
            if tensor.name in missing:
                assert packed is not None
                place = (packed, layout.to_download(tensor.begin)) if tensor.size_bytes else (packed, 0)
            else:
                place = _held(objects, tensor)
            for block in _copied(place, tensor):
                digest.update(block)
                body.update(block)
                target.write(block)
    if item.is_rebuilt and digest.hexdigest() != item.file.sha256:
        out.unlink()
        raise WrongBytes(f"{item.file.path}: the sha256 after rebuilding it from its tensors is {digest.hexdigest()}")
    return Digested(sha256=digest.hexdigest(), table=table, autov3=body.hexdigest())


def _header(item: PlannedFile, packed: Path | None, layout: Layout) -> tuple[bytes, TensorTable]:
    assert item.tensors is not None
    assert item.file.tensors is not None
    if not item.is_rebuilt:
        return canonical_header(item.tensors)
    assert packed is not None
    with packed.open("rb") as file:
        file.seek(layout.to_download(0))
        return file.read(item.file.tensors.header_bytes), item.file.tensors


def _in_order(tensors: Sequence[TensorEntry], table: TensorTable) -> Iterable[TensorEntry]:
    by_name = {t.name: t for t in tensors}
    return [by_name[t.name] for t in table.tensors]


def _held(objects: Objects, tensor: TensorEntry) -> tuple[Path, int]:
    found = objects.index.tensor_at(tensor.sha256, tensor.size_bytes)
    if found is None or not objects.path_of(found[0]).exists():
        raise Conflict(f"the tensor {tensor.name} is no longer held")
    return objects.path_of(found[0]), found[1]


def _copied(place: tuple[Path, int], tensor: TensorEntry) -> Iterable[bytes]:
    path, at = place
    digest, left = hashlib.sha256(), tensor.size_bytes
    with path.open("rb") as file:
        file.seek(at)
        while left and (block := file.read(min(READ_BYTES, left))):
            digest.update(block)
            left -= len(block)
            yield block
    if left or digest.hexdigest() != tensor.sha256:
        raise WrongBytes(f"the tensor {tensor.name} in {os.path.basename(path)[:12]} is damaged; run verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectWriter:
    """Writes downloads into the store as objects."""

    objects: Objects

    def find(self, item: PlannedFile) -> tuple[Link, ...]:
        """The link to the file's object; empty if it is not held."""
        index = self.objects.index
        if item.tensors is not None and not item.is_rebuilt:
            found = index.find_component(component_key(item.tensors))
        else:
            found = index.find(item.file.sha256) if item.file.sha256 else None
        if found is None or not self.objects.path_of(found).exists():
            return ()
        return ((item.link, found),)

    def write_small(self, item: PlannedFile, body: bytes) -> tuple[Path, Digested]:
        """Write a small file's bytes to a part."""
        part = self.objects.parts / f"{key_of(item)}.part"
        self.objects.reserve(len(body))
        part.write_bytes(body)
        digests = FileDigests(size_bytes=len(body), is_safetensors=item.file.path.endswith(".safetensors"))
        digests.update(body)
        return part, digests.finish()

    def publish_file(self, plan: FetchPlan, item: PlannedFile, path: Path, digested: Digested) -> str:
        """Publish the part as an object. BadHeader, and the part is removed, if it is not valid safetensors."""
        # A file named by its address is kept whatever it is; loading checks it.
        if digested.fault is not None and plan.manifest.kind != PLAIN_FILE:
            discard(path)
            raise BadHeader(f"{plan.manifest.reference} ({item.file.path}): {digested.fault.message}")
        may_alias = not plan.manifest.is_chosen
        sha256 = self.objects.publish(path, digested, may_alias=may_alias)
        path.with_suffix(".map").unlink(missing_ok=True)
        return sha256

    def publish_composed(self, item: PlannedFile, fetched: Path | None, layout: Layout, key: str) -> str:
        """Compose the file of its tensors and publish it. `fetched`: the downloaded tensors, arranged as `layout`.

        `key`: the download whose lock the caller holds, so that the file is not removed as abandoned.
        """
        assert item.tensors is not None
        out = self.objects.parts / f"{key}.whole"
        self.objects.reserve(item.size_bytes)
        made = compose(self.objects, item, fetched, layout, out)
        sha256 = self.objects.publish(out, made)
        if item.file.sha256:
            self.objects.index.add_origin(sha256, item.file.sha256)
        return sha256

    def split(self, plan: FetchPlan, item: PlannedFile, selection: Selection, key: str) -> tuple[Link, ...]:
        """Split a checkpoint that was fetched whole for a pipeline into its parts, which checkpoints share.

        `key` as for `publish_composed`. Empty if it stays whole: not such a checkpoint, or no disk space for both.
        """
        table = self.objects.index.table(item.file.sha256)
        if not selection.pipeline or table is None or not is_single_file(t.name for t in table.tensors):
            return ()
        manifest = replace(plan.manifest, files=(replace(item.file, tensors=table),), is_chosen=True)
        tensors = frozenset(t.sha256 for t in table.tensors)
        holdings = Holdings(tensors=tensors, components=self.objects.index.holdings().components)
        try:
            links = self._parts(make_plan(manifest, selection, holdings), item.file.sha256, key)
        except DiskFull as error:
            log.info("weights_kept_whole", path=item.file.path, why=error.message)
            return ()
        self.objects.remove(item.file.sha256)
        return links

    def _parts(self, plan: FetchPlan, whole: str, key: str) -> tuple[Link, ...]:
        """Compose each part; neither earlier parts nor the whole file are evicted to make space."""
        links: list[Link] = []
        with contextlib.ExitStack() as in_use:
            in_use.enter_context(self.objects.using([whole]))
            for part in plan.files:
                made = self.find(part) or ((part.link, self.publish_composed(part, None, Layout(segments=()), key)),)
                in_use.enter_context(self.objects.using(sha256 for _, sha256 in made))
                links.extend(made)
        return tuple(links)


def key_of(item: PlannedFile) -> str:
    """The key of a download for single flight: equal for equal bytes, whatever the reference."""
    file = item.file
    base = file.sha256 or hashlib.sha256(" ".join(file.sources).encode()).hexdigest()
    if item.tensors is None:
        return base
    wanted = hashlib.sha256(" ".join(t.sha256 for t in (*item.tensors, *item.missing)).encode()).hexdigest()
    return f"{base[:32]}-{wanted[:32]}"


def discard(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".map").unlink(missing_ok=True)
