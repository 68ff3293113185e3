"""Files made of tensors: from bytes just fetched and from objects that are held. Blocking; each byte is checked."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fanlight.errors import Conflict
from services.weights.chunks import Layout, Span, of_spans
from services.weights.digesting import Digested
from services.weights.errors import WrongBytes
from services.weights.files import READ_BYTES
from services.weights.manifest import TensorEntry, TensorTable
from services.weights.objects import Objects
from services.weights.plan import PlannedFile
from services.weights.targets import Digest
from services.weights.tensors import canonical_header


def layout_of(item: PlannedFile) -> Layout:
    """What of the source must be fetched for the file: its missing tensors, and its header where it is rebuilt."""
    assert item.tensors is not None
    return of_spans(item.wanted_spans)


def digests_of(item: PlannedFile, layout: Layout) -> tuple[Digest, ...]:
    return tuple(
        Digest(span=Span(at, at + t.size_bytes), sha256=t.sha256)
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
