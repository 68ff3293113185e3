"""What lies beside a checkpoint and says how it is meant: model cards, and the JSON files of A1111 and Civitai's tools.

Everything here was written by strangers: files have a limit, and what cannot be read says nothing. Knows no option.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.kernel.files import StrangeFile, open_ordinary, read_limited
from services.weights.references.tensors import LENGTH_BYTES, BadHeader, header_length

CARD_LIMIT_BYTES = 1024 * 1024
# Of the YAML in front of a card.
FRONT_LIMIT_BYTES = 16 * 1024
# Of a value that is looked at for words.
TEXT_LIMIT = 1_000
_CARD = "README.md"
# Beside NAME.safetensors: A1111's, Civitai Helper's, LoRA Manager's and StabilityMatrix's.
_ENDINGS = (".json", ".civitai.info", ".metadata.json", ".cm-info.json")
# Where such files say what a checkpoint is based on, such as `SDXL Turbo`.
_BASE_KEYS = ("baseModel", "BaseModel", "base_model")
# Where values of options may be, beside the file's own top.
_VALUE_KEYS = ("parameters", "defaults", "recommended")
# Standardized in the headers of safetensors: https://github.com/Stability-AI/ModelSpec.
_HEADER_KEYS = ("modelspec.title", "modelspec.architecture", "modelspec.tags", "baseModel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """`said`: texts that may have a word for the checkpoint's kind, by file. `values`: by file, the later wins."""

    said: Mapping[str, str] = field(default_factory=dict)
    values: tuple[tuple[str, Mapping[str, Any]], ...] = ()


def card_files(path: Path) -> list[Path]:
    """Those that may exist."""
    beside = [path.with_name(f"{path.stem}{ending}") for ending in _ENDINGS]
    return [path / _CARD] if path.suffix != ".safetensors" else beside


def card_of(path: Path) -> Card:
    """`path`: a checkpoint's folder or file, which need not exist."""
    said: dict[str, str] = {}
    values: list[tuple[str, Mapping[str, Any]]] = []
    for file in card_files(path):
        content = _front_matter(file) if file.name == _CARD else _json(file)
        texts = [content.get(key) for key in _BASE_KEYS] if file.name != _CARD else [content.get("tags")]
        if text := _text(texts):
            said[file.name] = text
        values += [(file.name, each) for each in _values(content, is_card=file.name == _CARD)]
    return Card(said=said, values=tuple(values))


def header_metadata(path: Path) -> Mapping[str, str]:
    """What a safetensors file says of its kind in its header; empty for a folder and for what cannot be read."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with open_ordinary(path) as opened:
            metadata = json.loads(opened.read(header_length(opened.read(LENGTH_BYTES)))).get("__metadata__", {})
        return {key: str(metadata[key])[:TEXT_LIMIT] for key in _HEADER_KEYS if key in metadata}
    except (OSError, StrangeFile, BadHeader, ValueError, RecursionError, AttributeError, TypeError):
        return {}


def _text(values: list[object]) -> str:
    """Strings and lists of strings, one below the other."""
    flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return "\n".join(each for each in flat if isinstance(each, str))[:TEXT_LIMIT]


def _values(content: Mapping[str, Any], *, is_card: bool) -> Iterator[Mapping[str, Any]]:
    """A card's examples first, then what it says for the hosted inference."""
    if not is_card:
        yield from (each for each in (content, *(content.get(key) for key in _VALUE_KEYS)) if isinstance(each, dict))
    else:
        widget = content.get("widget")
        examples = widget[:1] if isinstance(widget, list) else []
        yield from (found for each in examples if (found := _parameters(each)))
    if found := _parameters(content.get("inference")):
        yield found


def _parameters(content: object) -> Mapping[str, Any]:
    parameters = content.get("parameters") if isinstance(content, dict) else None
    return parameters if isinstance(parameters, dict) else {}


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(read_limited(file, CARD_LIMIT_BYTES))
    except (OSError, StrangeFile, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _front_matter(file: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines of dashes; nothing where it has aliases, which multiply."""
    import yaml

    try:
        text = read_limited(file, CARD_LIMIT_BYTES)[:FRONT_LIMIT_BYTES].decode(errors="replace")
        first, _, rest = text.partition("\n")
        front, found, _ = rest.partition("\n---")
        if first.strip() != "---" or not found or any(isinstance(each, yaml.AliasEvent) for each in yaml.parse(front)):
            return {}
        content = yaml.safe_load(front)
    except (OSError, StrangeFile, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
