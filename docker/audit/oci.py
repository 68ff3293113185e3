"""Manifests, configs and layers: from any place that hands out blobs by digest."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol

from audit.layers import read_layer
from audit.model import AuditError, Image, Layer

LISTS = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_BYTES_MAX = 16 << 20


class Blobs(Protocol):
    """Where an image's blobs are."""

    def open(self, digest: str) -> AbstractContextManager[BinaryIO]: ...


def read_image(name: str, blobs: Blobs, descriptor: Mapping[str, Any], platform: str) -> Image:
    """The image that the descriptor leads to, through an index where there is one."""
    digest = _choose(blobs, descriptor, platform)
    manifest = read_json(blobs, digest, "the manifest")
    config = read_json(blobs, _field(manifest, "config")["digest"], "the config")
    layers = _field(manifest, "layers")
    diff_ids = config.get("rootfs", {}).get("diff_ids", [])
    if len(diff_ids) != len(layers):
        raise AuditError(f"the manifest has {len(layers)} layers, the config {len(diff_ids)}")
    read = [
        _layer(blobs, layer, diff_id, command)
        for layer, diff_id, command in zip(layers, diff_ids, commands(config, len(layers)), strict=True)
    ]
    return Image(name=name, digest=digest, layers=tuple(read))


def _choose(blobs: Blobs, descriptor: Mapping[str, Any], platform: str) -> str:
    digest: str = descriptor["digest"]
    document = read_json(blobs, digest, "the manifest")
    if "manifests" not in document:
        return digest
    offered = {_platform(each): each["digest"] for each in document["manifests"]}
    if platform not in offered:
        raise AuditError(f"no image for {platform}; there are {', '.join(sorted(offered)) or 'none'}")
    return _choose(blobs, {"digest": offered[platform]}, platform)


def _platform(descriptor: Mapping[str, Any]) -> str:
    parts = descriptor.get("platform", {})
    return f"{parts.get('os', '?')}/{parts.get('architecture', '?')}"


def _layer(blobs: Blobs, layer: Mapping[str, Any], diff_id: str, command: str) -> Layer:
    digest = layer["digest"]
    try:
        with blobs.open(digest) as source:
            return read_layer(source, digest=digest, size_bytes=layer["size"], diff_id=diff_id, command=command)
    except FileNotFoundError as error:
        if layer.get("urls") or "foreign" in layer.get("mediaType", ""):
            raise AuditError(
                f"layer {digest[:19]} is foreign and not part of the image: {layer.get('urls')}"
            ) from error
        raise AuditError(f"layer {digest[:19]} is missing") from error


def commands(config: Mapping[str, Any], count: int) -> list[str]:
    """What made each layer; empty where the history does not say."""
    made = [step.get("created_by", "") for step in config.get("history", []) if not step.get("empty_layer")]
    return made if len(made) == count else [""] * count


def read_json(blobs: Blobs, digest: str, what: str) -> dict[str, Any]:
    try:
        with blobs.open(digest) as source:
            found = json.loads(source.read(MANIFEST_BYTES_MAX))
    except FileNotFoundError as error:
        raise AuditError(f"{what} {digest[:19]} is missing") from error
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
        name = descriptor.get("annotations", {}).get("org.opencontainers.image.ref.name", "")
        if not tag or name == tag or name.endswith(f":{tag}"):
            yield descriptor
