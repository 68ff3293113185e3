"""Which of the manifests in an index is the image: those of attestations, signatures and other artifacts are not.

An entry may name no platform, as buildah, oras and nix write it; then the image's config does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .model import AuditError
from .reading import Blobs, read_json

LISTS = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
INDEX_DEPTH_MAX = 4
# What may stand in an index before it is no index of one image any more.
ENTRIES_MAX = 1000
_REFERENCE_TYPE = "vnd.docker.reference.type"
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A manifest of an image. `platform`: as `os/architecture[/variant]`; empty where nothing says it."""

    digest: str
    platform: str = ""

    def is_for(self, platform: str) -> bool:
        """Of any variant where none is asked for."""
        return platform in (self.platform, self.platform.rpartition("/")[0])


def choose(blobs: Blobs, descriptors: Iterable[Mapping[str, Any]], platform: str) -> Candidate:
    """The image for the platform; the only image there is, where nothing says its platform. AuditError."""
    found = list({each.digest: each for each in _candidates(blobs, descriptors)}.values())
    fitting = [each for each in found if each.is_for(platform)]
    unsaid = [each for each in found if not each.platform]
    if not fitting and len(found) == len(unsaid) == 1:
        fitting = unsaid
    if fitting:
        return fitting[0]
    names = sorted({each.platform or "one that names no platform" for each in found})
    raise AuditError(f"no image for {platform}; there are {', '.join(names) or 'none'}")


def for_platform(blobs: Blobs, descriptors: Sequence[Mapping[str, Any]], platform: str) -> list[Mapping[str, Any]]:
    """Of the entries of a layout's own index, those that lead to an image for the platform."""
    return [each for each in descriptors if any(found.is_for(platform) for found in _candidates(blobs, [each]))]


def images_among(blobs: Blobs, descriptors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the entries of a layout's own index, those that lead to any image."""
    return [each for each in descriptors if next(_candidates(blobs, [each]), None)]


def _candidates(blobs: Blobs, descriptors: Iterable[Mapping[str, Any]], depth: int = 0) -> Iterator[Candidate]:
    if depth > INDEX_DEPTH_MAX:
        raise AuditError(f"an index in an index, more than {INDEX_DEPTH_MAX} times")
    for number, each in enumerate(descriptors):
        if number >= ENTRIES_MAX:
            raise AuditError(f"an index of more than {ENTRIES_MAX} entries")
        told = _platform(each)
        if _is_beside(each, told) and each.get("mediaType") not in LISTS:
            continue
        if told and _UNKNOWN not in told and each.get("mediaType") not in LISTS:
            yield Candidate(digest=each["digest"], platform=told)
        else:
            yield from _looked_into(blobs, each, depth)


def _looked_into(blobs: Blobs, descriptor: Mapping[str, Any], depth: int) -> Iterator[Candidate]:
    """What an entry leads to that says too little of itself. A blob that was not copied along leads nowhere."""
    digest = descriptor["digest"]
    try:
        document = read_json(blobs, digest, "the manifest")
    except FileNotFoundError:
        return
    if "manifests" in document:
        yield from _candidates(blobs, document["manifests"], depth + 1)
        return
    config = document.get("config") or {}
    if "layers" not in document or not _is_image(document, config):
        # It is said what is wrong with it, where it is the only one.
        if depth == 0 and "config" not in document:
            yield Candidate(digest=digest)
        return
    try:
        told = _platform({"platform": read_json(blobs, config["digest"], "the config")})
    except FileNotFoundError as error:
        raise AuditError(f"the config {config['digest'][:19]} is missing") from error
    yield Candidate(digest=digest, platform=told)


def _is_beside(descriptor: Mapping[str, Any], platform: str) -> bool:
    """Whether an entry says itself that it is about an image, and is none."""
    annotations = descriptor.get("annotations") or {}
    is_artifact = descriptor.get("artifactType", CONFIGS[0]) not in CONFIGS
    return _REFERENCE_TYPE in annotations or is_artifact or platform == f"{_UNKNOWN}/{_UNKNOWN}"


def _is_image(document: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """A referrer names its subject; a signature, a chart or a wasm module has a config of its own kind."""
    is_typed = config.get("mediaType", CONFIGS[0]) in CONFIGS and document.get("artifactType", CONFIGS[0]) in CONFIGS
    kinds = [str(layer.get("mediaType", "")) for layer in document["layers"]]
    is_attestation = bool(kinds) and all("in-toto" in kind for kind in kinds)
    return is_typed and "subject" not in document and not is_attestation


def _platform(descriptor: Mapping[str, Any]) -> str:
    parts = descriptor.get("platform") or {}
    if not parts.get("os") or not parts.get("architecture"):
        return ""
    variant = parts.get("variant", "")
    return f"{parts['os']}/{parts['architecture']}{f'/{variant}' if variant else ''}"
