"""Files of weights that another file in the same folder makes superfluous, recognized by their names."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .model import Entry, Finding, Image, finding
from .rootfs import RootFs, folder

SAFE = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pth", ".pt")
_HALF = re.compile(r"[._-](?:fp16|f16|half)(?=$|[._-])", re.IGNORECASE)
_FULL = re.compile(r"[._-](?:fp32|f32)(?=$|[._-])", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=$|[._-])")


@dataclass(frozen=True, slots=True)
class _Weights:
    entry: Entry
    extension: str
    is_half: bool


def fp32_beside_fp16(image: Image, root: RootFs) -> Iterator[Finding]:
    for variants in _variants(root):
        halves = [each for each in variants if each.is_half]
        for each in variants:
            beside = next((half for half in halves if half.extension in (SAFE, each.extension)), None)
            if beside and not each.is_half:
                yield finding("fp32 beside fp16", each.entry, f"{_name(beside)} lies beside it")


def pickle_beside_safetensors(image: Image, root: RootFs) -> Iterator[Finding]:
    for variants in _variants(root):
        for each in variants:
            safe = next((one for one in variants if one.extension == SAFE and one.is_half == each.is_half), None)
            if safe and each.extension in PICKLES:
                yield finding("pickle beside safetensors", each.entry, f"{_name(safe)} lies beside it")


def _variants(root: RootFs) -> list[list[_Weights]]:
    """Files of one folder that hold the same weights in another format or precision, or in several parts."""
    groups: dict[str, list[_Weights]] = defaultdict(list)
    for entry in root.files():
        stem, extension = posixpath.splitext(posixpath.basename(entry.path))
        if extension in (SAFE, *PICKLES):
            plain = _SHARD.sub("", _FULL.sub("", _HALF.sub("", stem)))
            # transformers calls the same weights pytorch_model.bin and model.safetensors.
            key = posixpath.join(folder(entry.path), "model" if plain == "pytorch_model" else plain)
            groups[key].append(_Weights(entry, extension, is_half=bool(_HALF.search(stem))))
    return [sorted(group, key=lambda each: each.entry.path) for group in groups.values()]


def _name(weights: _Weights) -> str:
    return posixpath.basename(weights.entry.path)
