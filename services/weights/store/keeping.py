"""From bytes that lie on the disk to objects in the store: whole files, files of tensors, checkpoints as their parts.

Blocking; knows no network.
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
from services.weights.transfer.partial import Layout, of_spans

log = get_logger()

# Where an object stands in a view, and its sha256.
Link = tuple[str, str]


def layout_of(item: PlannedFile) -> Layout:
    """What of the source must be fetched for the file: its missing tensors, and its header where it is rebuilt."""
    assert item.tensors is not None
    return of_spans(item.wanted_spans)


def digests_of(item: PlannedFile, layout: Layout) -> tuple[SpanDigest, ...]:
    return tuple(
        SpanDigest(span=ByteSpan(at, at + t.size_bytes), sha256=t.sha256)
        for t in item.missing
        if t.size_bytes
        for at in [layout.to_download(t.begin)]
    )


def compose(objects: Objects, item: PlannedFile, packed: Path | None, layout: Layout, out: Path) -> Digested:
    """Write the file at `out`. Conflict when a tensor that was held is gone; WrongBytes when one is not what it was."""
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
        raise WrongBytes(f"{item.file.path}: rebuilt from its tensors, its sha256 is {digest.hexdigest()}")
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
    objects: Objects

    def held(self, item: PlannedFile) -> tuple[Link, ...]:
        """The file's object; none where it is not here."""
        index = self.objects.index
        if item.tensors is not None and not item.is_rebuilt:
            found = index.find_component(component_key(item.tensors))
        else:
            found = index.find(item.file.sha256) if item.file.sha256 else None
        if found is None or not self.objects.path_of(found).exists():
            return ()
        return ((item.link, found),)

    def written(self, item: PlannedFile, body: bytes) -> tuple[Path, Digested]:
        """A small file's bytes as a part."""
        part = self.objects.parts / f"{key_of(item)}.part"
        self.objects.reserve(len(body))
        part.write_bytes(body)
        digests = FileDigests(size_bytes=len(body), is_safetensors=item.file.path.endswith(".safetensors"))
        digests.update(body)
        return part, digests.finish()

    def whole(self, plan: FetchPlan, item: PlannedFile, path: Path, digested: Digested) -> str:
        """The part becomes an object. BadHeader where it is no sound safetensors file, and then it is gone."""
        # Bytes named by their address are kept whatever they are; loading them asks again.
        if digested.fault is not None and plan.manifest.kind != PLAIN_FILE:
            discard(path)
            raise BadHeader(f"{plan.manifest.reference} ({item.file.path}): {digested.fault.message}")
        may_alias = not plan.manifest.is_chosen
        sha256 = self.objects.publish(path, digested, may_alias=may_alias)
        path.with_suffix(".map").unlink(missing_ok=True)
        return sha256

    def composed(self, item: PlannedFile, fetched: Path | None, layout: Layout, key: str) -> str:
        """The file made of its tensors becomes an object. `fetched`: those that were not held, as `layout` says.

        `key`: whose lock is held, for what is in the making not to be taken for abandoned.
        """
        assert item.tensors is not None
        out = self.objects.parts / f"{key}.whole"
        self.objects.reserve(item.size_bytes)
        made = compose(self.objects, item, fetched, layout, out)
        sha256 = self.objects.publish(out, made)
        if item.file.sha256:
            self.objects.index.add_origin(sha256, item.file.sha256)
        return sha256

    def split(self, plan: FetchPlan, item: PlannedFile, wish: Selection, key: str) -> tuple[Link, ...]:
        """A checkpoint fetched whole for a pipeline is kept as its parts, each once for all checkpoints.

        `key` as for `composed`. None where it stays whole: it is no such checkpoint, or there is no room for both.
        """
        table = self.objects.index.table(item.file.sha256)
        if not wish.pipeline or table is None or not is_single_file(t.name for t in table.tensors):
            return ()
        manifest = replace(plan.manifest, files=(replace(item.file, tensors=table),), is_chosen=True)
        tensors = frozenset(t.sha256 for t in table.tensors)
        holdings = Holdings(tensors=tensors, components=self.objects.index.holdings().components)
        try:
            links = self._parts(make_plan(manifest, wish, holdings), item.file.sha256, key)
        except DiskFull as error:
            log.info("weights_kept_whole", path=item.file.path, why=error.message)
            return ()
        self.objects.remove(item.file.sha256)
        return links

    def _parts(self, plan: FetchPlan, whole: str, key: str) -> tuple[Link, ...]:
        """Room for one is not made by evicting another, nor what all are made of."""
        links: list[Link] = []
        with contextlib.ExitStack() as in_use:
            in_use.enter_context(self.objects.using([whole]))
            for part in plan.files:
                made = self.held(part) or ((part.link, self.composed(part, None, Layout(segments=()), key)),)
                in_use.enter_context(self.objects.using(sha256 for _, sha256 in made))
                links.extend(made)
        return tuple(links)


def key_of(item: PlannedFile) -> str:
    """The name of a download: the same for all who want the same bytes, whatever they call them."""
    file = item.file
    base = file.sha256 or hashlib.sha256(" ".join(file.sources).encode()).hexdigest()
    if item.tensors is None:
        return base
    wanted = hashlib.sha256(" ".join(t.sha256 for t in (*item.tensors, *item.missing)).encode()).hexdigest()
    return f"{base[:32]}-{wanted[:32]}"


def discard(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".map").unlink(missing_ok=True)
