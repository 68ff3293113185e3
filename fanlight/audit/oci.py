"""An image from its manifest, config and layers, wherever the blobs are."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .choosing import choose
from .layers import read_layer
from .model import AuditError, Image, Layer
from .reading import Blobs, required_json

FOREIGN = ("foreign", "nondistributable")
ZSTD_CHUNKED = ("io.containers.zstd-chunked.", "io.github.containers.zstd-chunked.")


# Layers that were read already, for images that share them.
Known = dict[str, Layer]


def read_image(name: str, blobs: Blobs, descriptor: Mapping[str, Any], platform: str, known: Known) -> Image:
    """The image that the descriptor leads to, through an index where there is one. A layer in `known` is not read."""
    try:
        return _read_image(name, blobs, descriptor, platform, known)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AuditError(f"the manifest or the config is not as OCI wants it: {error!r}") from error


def _read_image(name: str, blobs: Blobs, descriptor: Mapping[str, Any], platform: str, known: Known) -> Image:
    digest = descriptor["digest"]
    manifest = required_json(blobs, digest, "the manifest")
    if "manifests" in manifest:
        digest = choose(blobs, manifest["manifests"], platform).digest
        manifest = required_json(blobs, digest, "the manifest")
    config = required_json(blobs, _field(manifest, "config")["digest"], "the config")
    layers = _field(manifest, "layers")
    diff_ids = config.get("rootfs", {}).get("diff_ids", [])
    if len(diff_ids) != len(layers):
        raise AuditError(f"the manifest has {len(layers)} layers, the config {len(diff_ids)}")
    read = [
        _known_layer(blobs, layer, diff_id, command, known)
        for layer, diff_id, command in zip(layers, diff_ids, commands(config, len(layers)), strict=True)
    ]
    return Image(name=name, digest=digest, layers=tuple(read))


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


def _field(document: Mapping[str, Any], name: str) -> Any:
    if name not in document:
        raise AuditError(f"the manifest has no {name!r}: only schema 2 and OCI images can be read")
    return document[name]


def tagged(index: Mapping[str, Any], tag: str) -> Iterator[Mapping[str, Any]]:
    """The manifests of a layout's index that have the tag; all of them where it is empty."""
    for descriptor in index.get("manifests", []):
        name = tag_of(descriptor)
        if not tag or name == tag or name.endswith((f":{tag}", f"/{tag}")):
            yield descriptor


def tag_of(descriptor: Mapping[str, Any]) -> str:
    """containerd and docker write the whole name beside the tag."""
    annotations = descriptor.get("annotations") or {}
    return str(annotations.get("io.containerd.image.name") or annotations.get("org.opencontainers.image.ref.name", ""))
