"""What a LoRA's file or folder is, by headers alone: its base, other names, and what else it brings along.

Reads no weights, loads no torch.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.diffusion.models.entries import EmbeddingEntry, LoraEntry, license_of, part_id
from services.diffusion.models.headers import read_header
from services.diffusion.models.lora_names import BUNDLED, LoraName, UnsupportedForm, lora_names, plain_name
from services.diffusion.models.name_patterns import BadPattern
from services.diffusion.models.peft_config import BadPeftConfig, adapter_files, peft_scales
from services.diffusion.models.recipes import UnfitFolder

Shape = tuple[int, ...]
BUNDLES_LIMIT = 100
_WORDS_CHARACTERS_LIMIT = 200
# The name that kohya's scripts were asked to write the file under; what a prompt may call it.
_OUTPUT_NAME = "ss_output_name"
_ALIAS_CHARACTERS_LIMIT = 100
# Beginnings of what trainers write about the base, and the width of its prompt embeddings.
_BASES = (
    ("ss_base_model_version", (("sdxl", 2048), ("sd_v1", 768), ("sd_1", 768), ("sd_v2", 1024), ("sd_2", 1024))),
    (
        "modelspec.architecture",
        (("stable-diffusion-xl", 2048), ("stable-diffusion-v1", 768), ("stable-diffusion-v2", 1024)),
    ),
)
# The widths of known text encoders; others are of families of their own, about which no metadata tells.
_KNOWN_WIDTHS = frozenset({0, 768, 1024, 1280})
# Layers whose inputs are prompt embeddings, and layers whose inputs are a text encoder's states.
_KEYS = ("attn2_to_k", "attn2_to_v")
_TEXT_INPUTS = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp_fc1")


def lora_entry(path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> LoraEntry:
    """Of a safetensors file with these tensors. UnfitFolder for one that is not applied, with the reason."""
    return _entry(path, shapes, {path: metadata})


def lora_folder_entry(folder: Path) -> LoraEntry | None:
    """Of a folder with PEFT's adapters for the parts of a model; None for any other. UnfitFolder as above."""
    files = adapter_files(folder)
    headers = {head: read_header(file) for head, file in files.items()}
    shapes = {f"{head}{name}": shape for head, header in headers.items() for name, shape in header.shapes.items()}
    return _entry(folder, shapes, {file: headers[head].metadata for head, file in files.items()}) if files else None


def _entry(path: Path, shapes: Mapping[str, Shape], files: Mapping[Path, Mapping[str, str]]) -> LoraEntry:
    """`files`: the metadata of each. `shapes`: of all, by what the tensors are called together."""
    try:
        names = lora_names(shapes)
        for file, own in files.items():
            peft_scales(file, own)
    except UnsupportedForm as form:
        raise UnfitFolder(f"it is {form}") from form
    except (BadPeftConfig, BadPattern) as error:
        raise UnfitFolder(str(error)) from error
    metadata = next(iter(files.values())) if len(files) == 1 else {}
    id_, size_bytes = part_id(path), sum(file.stat().st_size for file in files)
    bundled = _bundled(path, shapes, size_bytes=size_bytes, lora_id=id_)
    return LoraEntry(
        id=id_,
        path=path,
        cross_attention_dim=_width(names, shapes, metadata),
        size_bytes=size_bytes,
        license=license_of(path),
        aliases=_aliases(id_, metadata),
        bundled=bundled,
        note="; ".join(_notes(names, bundled)),
    )


def _notes(names: Mapping[str, LoraName], bundled: Iterable[EmbeddingEntry]) -> Iterator[str]:
    if any(meant.what.startswith("oft_") for meant in names.values()):
        yield "is an OFT, which rotates weights and is applied as a LoRA"
    if words := ", ".join(each.id for each in bundled):
        yield f"brings textual inversions along: {words[:_WORDS_CHARACTERS_LIMIT]}"


def _aliases(id_: str, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """As A1111 has it, where a prompt's tag can hold it."""
    name = metadata.get(_OUTPUT_NAME, "")
    is_name = isinstance(name, str) and 0 < len(name) <= _ALIAS_CHARACTERS_LIMIT and name.isprintable()
    if not is_name or name.strip() in ("", id_, "*", "None") or any(mark in name for mark in ":/<>"):
        return ()
    return (name.strip(),)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """The shapes of a module's tensors, by what each is."""

    shapes: Mapping[str, Shape]

    @property
    def inputs(self) -> int:
        """How many a layer takes; 0 where the tensors do not show it."""
        for what in ("down", "hada_w1_b", "diff", "glora_b2"):
            if len(shape := self.shapes.get(what, ())) > 1:
                return shape[1]
        one = self.shapes.get("lokr_w1") or self.shapes.get("lokr_w1_b", ())
        two = self.shapes.get("lokr_w2") or self.shapes.get("lokr_w2_b", ())
        return one[1] * two[1] if len(one) > 1 and len(two) == 2 else 0


def _width(names: Mapping[str, LoraName], shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> int:
    """Of the prompt embeddings that it was trained on; 0 where the file does not show it, so that all may fit."""
    modules: dict[tuple[str, str], dict[str, Shape]] = defaultdict(dict)
    for name, meant in names.items():
        modules[meant.part, plain_name(meant.module)][meant.what] = shapes[name]
    inputs = [(part, module, _Module(shapes=of)) for (part, module), of in modules.items()]
    keys = (of.inputs for part, name, of in inputs if part == "unet" and name.endswith(_KEYS))
    if width := next(filter(None, keys), 0):
        return width
    texts = {
        part: of.inputs for part, name, of in inputs if part != "unet" and name.endswith(_TEXT_INPUTS) and of.inputs
    }
    first, second = texts.get("text_encoder", 0), texts.get("text_encoder_2", 0)
    if first and second:
        return first + second
    # kohya's names tell the only text encoder from the first of two.
    if first and any(name.startswith("lora_te_") for name in names):
        return first
    return _declared(metadata) if {first, second} <= _KNOWN_WIDTHS else 0


def _declared(metadata: Mapping[str, str]) -> int:
    for key, bases in _BASES:
        said = str(metadata.get(key, "")).lower()
        if width := next((width for beginning, width in bases if said.startswith(beginning)), 0):
            return width
    return 0


def _bundled(path: Path, shapes: Mapping[str, Shape], *, size_bytes: int, lora_id: str) -> tuple[EmbeddingEntry, ...]:
    """Textual inversions in the LoRA's own file, as OneTrainer and A1111's tools write them."""
    found: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        if name.startswith(BUNDLED):
            word, _, rest = name.removeprefix(BUNDLED).partition(".")
            found[word][rest] = shape
    if len(found) > BUNDLES_LIMIT:
        raise UnfitFolder(f"it brings {len(found)} textual inversions along; at most {BUNDLES_LIMIT} are read")
    entries = []
    for word, own in found.items():
        vectors = [own[name] for name in bundled_order(own)]
        if (
            not word.strip()
            or not word.isprintable()
            or not vectors
            or not all(1 <= len(each) <= 2 for each in vectors)
        ):
            raise UnfitFolder(f"the textual inversion {word[:40]!r} in it has no vectors")
        entries.append(
            EmbeddingEntry(
                id=word,
                path=path,
                widths=tuple(shape[-1] for shape in vectors),
                vectors=vectors[0][0] if len(vectors[0]) == 2 else 1,
                size_bytes=size_bytes,
                bundled_in=lora_id,
            )
        )
    return tuple(entries)


def bundled_order(names: Mapping[str, object]) -> tuple[str, ...]:
    """The names of a textual inversion's vectors, within its own, in the order of the text encoders."""
    pair = ("clip_l", "clip_g")
    if set(pair) <= names.keys():
        return pair
    known = tuple(name for name in names if name.startswith("string_to_param.") or name in ("emb_params", *pair))
    candidates = known or tuple(names)
    return candidates if len(candidates) == 1 else ()
