"""What the audit found, as plain values: the one form that every output is made from."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .distributions import distributions, reasons
from .findings import by_kind, find
from .model import Image
from .rootfs import merge
from .tree import tree_of

# What a node of ours wrote to its disk from gzip; `--unpack-mb-s` changes it.
UNPACK_BYTES_S = 200_000_000


def set_bytes(images: Sequence[Image]) -> int:
    """Bytes of all layers, each counted once."""
    return sum({layer.digest: layer.compressed_bytes for image in images for layer in image.layers}.values())


def describe(image: Image) -> dict[str, Any]:
    root = merge(image)
    findings = find(image, root)
    return {
        "name": image.name,
        "digest": image.digest,
        "compressed_bytes": image.compressed_bytes,
        "unpacked_bytes": image.unpacked_bytes,
        "rootfs_bytes": root.size_bytes,
        "reasons": reasons(root),
        "layers": [
            {
                "digest": layer.digest,
                "diff_id": layer.diff_id,
                "compressed_bytes": layer.compressed_bytes,
                "is_estimate": layer.is_estimate,
                "unpacked_bytes": layer.unpacked_bytes,
                "files": len(layer.entries),
                "command": layer.command,
            }
            for layer in image.layers
        ],
        "distributions": [_renamed(asdict(each)) for each in distributions(root)],
        "finding_bytes": by_kind(findings),
        "findings": [_renamed(asdict(each)) for each in findings],
        "paths": _paths(root.files()),
        "tree": tree_of(root),
    }


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    row["bytes"] = row.pop("size_bytes")
    return row


def _paths(files: Any, depth: int = 6, most: int = 400) -> dict[str, int]:
    """Bytes under the largest folders, so many levels deep."""
    sums: dict[str, int] = {}
    for entry in files:
        parts = entry.path.split("/")
        for level in range(1, min(depth, len(parts)) + 1):
            key = "/".join(parts[:level])
            sums[key] = sums.get(key, 0) + entry.size_bytes
    largest = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:most]
    return dict(largest)


def describe_set(images: Sequence[Image]) -> dict[str, int]:
    """`shared_bytes`: what sharing layers saves, of what the images would be apart from each other."""
    total = set_bytes(images)
    return {"compressed_bytes": total, "shared_bytes": sum(set_bytes([image]) for image in images) - total}


def shared_with(images: Sequence[Image]) -> list[list[list[str]]]:
    """For each layer of each image, the names of the other images that have it."""
    holders: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        for digest in {layer.digest for layer in image.layers}:
            holders.setdefault(digest, []).append(index)
    return [
        [[images[other].name for other in holders[layer.digest] if other != index] for layer in image.layers]
        for index, image in enumerate(images)
    ]


def ready(
    image: Image, held: Sequence[Image], link_mbps: Sequence[float], unpack_bytes_s: float = UNPACK_BYTES_S
) -> dict[str, Any]:
    """What a node that holds the given images still has to fetch and unpack, and for how long."""
    there = {layer.digest for each in held for layer in each.layers}
    missing = {layer.digest: layer for layer in image.layers if layer.digest not in there}.values()
    fetch = sum(layer.compressed_bytes for layer in missing)
    unpack = sum(layer.unpacked_bytes for layer in missing)
    return {
        "fetch_bytes": fetch,
        "unpack_bytes": unpack,
        "seconds": {f"{rate:g}": round(fetch * 8 / (rate * 1e6) + unpack / unpack_bytes_s, 1) for rate in link_mbps},
    }


def difference(now: Image, before: Image) -> dict[str, Any]:
    """Paths that came, went or changed, by bytes; and layers that are still the same."""
    new = {entry.path: entry for entry in merge(now).files()}
    old = {entry.path: entry for entry in merge(before).files()}
    same = {layer.digest for layer in before.layers} & {layer.digest for layer in now.layers}
    rows = [
        {"path": path, "bytes": _size(new, path) - _size(old, path), "why": _why(path in new, path in old)}
        for path in new.keys() | old.keys()
        if path not in new or path not in old or new[path].sha256 != old[path].sha256
    ]
    return {
        "compressed_bytes": now.compressed_bytes - before.compressed_bytes,
        "unpacked_bytes": now.unpacked_bytes - before.unpacked_bytes,
        "same_layers": len(same),
        "paths": sorted(rows, key=lambda row: (-abs(row["bytes"]), row["path"])),
    }


def _size(files: dict[str, Any], path: str) -> int:
    return files[path].size_bytes if path in files else 0


def _why(is_there: bool, was_there: bool) -> str:
    return "changed" if is_there and was_there else "new" if is_there else "gone"
