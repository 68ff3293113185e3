"""All that it takes to paint a picture again, as JSON. Loads no torch."""

import json
from collections.abc import Mapping
from importlib import metadata

from google.protobuf.json_format import MessageToDict

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Generation
from services.diffusion.infotext import Digests
from services.diffusion.models.entries import (
    CheckpointEntry,
    ControlNetEntry,
    EmbeddingEntry,
    Entry,
    LoraEntry,
    VaeEntry,
)

PACKAGES = ("fanlight", "torch", "diffusers", "tokenizers", "safetensors", "numpy")

KINDS: Mapping[type, str] = {
    CheckpointEntry: "checkpoint",
    ControlNetEntry: "controlnet",
    LoraEntry: "lora",
    VaeEntry: "vae",
    EmbeddingEntry: "embedding",
}


def provenance_json(
    generation: Generation,
    effective: diffusion_pb2.GenerateRequest,
    entries: tuple[Entry, ...],
    digests: Digests,
    *,
    device: str,
    dtype: str,
) -> str:
    """`effective`: the request with everything filled in; sent again with the same pictures it paints the same."""
    content = {
        "parameters": MessageToDict(effective, preserving_proto_field_name=True),
        "pictures": dict(generation.pictures),
        "weights": [
            {
                "kind": KINDS[type(entry)],
                "id": entry.id,
                **({"reference": entry.reference} if entry.reference else {}),
                "sha256": {digest.path: digest.sha256 for digest in digests(entry)},
            }
            for entry in entries
        ],
        "versions": versions(),
        "device": device,
        "dtype": dtype,
    }
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"))


def versions() -> dict[str, str]:
    return {package: version_of(package) for package in PACKAGES}


def version_of(package: str) -> str:
    """Empty where the package is not installed as one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
