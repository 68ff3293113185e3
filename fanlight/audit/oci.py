"""Manifests, configs and layers: from any place that hands out blobs by digest."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from http.client import HTTPException
from typing import Any, BinaryIO, Protocol

from .layers import read_layer
from .model import AuditError, Image, Layer
from .streams import hash_of

LISTS = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
FOREIGN = ("foreign", "nondistributable")
ZSTD_CHUNKED = ("io.containers.zstd-chunked.", "io.github.containers.zstd-chunked.")
MANIFEST_BYTES_MAX = 16 << 20
INDEX_DEPTH_MAX = 4


# Layers that were read already, for images that share them.
Known = dict[str, Layer]


class Blobs(Protocol):
    """Where an image's blobs are."""

    def open(self, digest: str) -> AbstractContextManager[BinaryIO]: ...


def read_image(name: str, blobs: Blobs, descriptor: Mapping[str, Any], platform: str, known: Known) -> Image:
    """The image that the descriptor leads to, through an index where there is one. A layer in `known` is not read."""
    try:
        return _read_image(name, blobs, descriptor, platform, known)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AuditError(f"the manifest or the config is not as OCI wants it: {error!r}") from error


def _read_image(name: str, blobs: Blobs, descriptor: Mapping[str, Any], platform: str, known: Known) -> Image:
    digest, manifest = _choose(blobs, descriptor, platform)
    config = read_json(blobs, _field(manifest, "config")["digest"], "the config")
    layers = _field(manifest, "layers")
    diff_ids = config.get("rootfs", {}).get("diff_ids", [])
    if len(diff_ids) != len(layers):
        raise AuditError(f"the manifest has {len(layers)} layers, the config {len(diff_ids)}")
    read = [
        _known_layer(blobs, layer, diff_id, command, known)
        for layer, diff_id, command in zip(layers, diff_ids, commands(config, len(layers)), strict=True)
    ]
    return Image(name=name, digest=digest, layers=tuple(read))


def _choose(blobs: Blobs, descriptor: Mapping[str, Any], platform: str) -> tuple[str, dict[str, Any]]:
    """The digest and the contents of the manifest for the platform."""
    document = read_json(blobs, descriptor["digest"], "the manifest")
    if "manifests" not in document:
        return descriptor["digest"], document
    offered = list(_offered(blobs, document))
    chosen = for_platform(offered, platform)
    if not chosen:
        names = ", ".join(sorted({_platform(each) for each in offered}))
        raise AuditError(f"no image for {platform}; there are {names or 'none'}")
    return _choose(blobs, chosen[0], platform)


def _offered(blobs: Blobs, index: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The manifests of an index, also those of indexes in it that say no platform."""
    if depth > INDEX_DEPTH_MAX:
        raise AuditError(f"an index in an index, more than {INDEX_DEPTH_MAX} times")
    for each in index["manifests"]:
        if each.get("mediaType") in LISTS and "platform" not in each:
            yield from _offered(blobs, read_json(blobs, each["digest"], "the index"), depth + 1)
        else:
            yield each


def for_platform(offered: Sequence[Mapping[str, Any]], platform: str) -> list[Mapping[str, Any]]:
    """Those for `os/architecture`, of any variant, or for `os/architecture/variant`."""
    return [each for each in offered if platform in (_platform(each), _platform(each).rpartition("/")[0])]


def _platform(descriptor: Mapping[str, Any]) -> str:
    parts = descriptor.get("platform") or {}
    variant = parts.get("variant", "")
    return f"{parts.get('os', '?')}/{parts.get('architecture', '?')}{f'/{variant}' if variant else ''}"


def _known_layer(blobs: Blobs, layer: Mapping[str, Any], diff_id: str, command: str, known: Known) -> Layer:
    key = f"{layer['digest']} {layer['size']} {diff_id}"
    if key not in known:
        known[key] = _layer(blobs, layer, diff_id, command)
    return replace(known[key], command=command)


def _layer(blobs: Blobs, layer: Mapping[str, Any], diff_id: str, command: str) -> Layer:
    digest, size_bytes = layer["digest"], layer["size"]
    if not isinstance(size_bytes, int) or size_bytes < 0:
        raise AuditError(f"layer {digest[:19]} has the size {size_bytes!r}")
    exact = not any(name.startswith(ZSTD_CHUNKED) for name in layer.get("annotations") or ())
    try:
        with blobs.open(digest) as source:
            return read_layer(
                source, digest=digest, size_bytes=size_bytes, diff_id=diff_id, command=command, exact=exact
            )
    except FileNotFoundError as error:
        if layer.get("urls") or any(word in layer.get("mediaType", "") for word in FOREIGN):
            where = ", ".join(layer.get("urls") or ()) or "nobody says where it is"
            raise AuditError(f"layer {digest[:19]} is foreign and not part of the image: {where}") from error
        raise AuditError(f"layer {digest[:19]} is missing") from error


def commands(config: Mapping[str, Any], count: int) -> list[str]:
    """What made each layer; empty where the history does not say."""
    made = [step.get("created_by", "") for step in config.get("history", []) if not step.get("empty_layer")]
    return made if len(made) == count else [""] * count


def read_json(blobs: Blobs, digest: str, what: str) -> dict[str, Any]:
    try:
        with blobs.open(digest) as source:
            body = source.read(MANIFEST_BYTES_MAX)
    except FileNotFoundError as error:
        raise AuditError(f"{what} {digest[:19]} is missing") from error
    except (OSError, HTTPException) as error:
        raise AuditError(f"{what} {digest[:19]} cannot be read: {error}") from error
    if f"{hash_of(digest)}:{hashlib.new(hash_of(digest), body).hexdigest()}" != digest:
        raise AuditError(f"{what} {digest[:19]} is not what its digest says")
    try:
        found = json.loads(body)
    except ValueError as error:
        raise AuditError(f"{what} {digest[:19]} is no JSON") from error
    if not isinstance(found, dict):
        raise AuditError(f"{what} {digest[:19]} is no JSON object")
    return found


def _field(document: Mapping[str, Any], name: str) -> Any:
    if name not in document:
        raise AuditError(f"the manifest has no {name!r}: only schema 2 and OCI images can be read")
    return document[name]


def tagged(index: Mapping[str, Any], tag: str) -> Iterator[Mapping[str, Any]]:
    """The manifests of a layout's index that have the tag; all of them where it is empty."""
    for descriptor in index.get("manifests", []):
        name = (descriptor.get("annotations") or {}).get("org.opencontainers.image.ref.name", "")
        if not tag or name == tag or name.endswith(f":{tag}"):
            yield descriptor
