"""What an image was made from: the weights' digests, all parameters as JSON, and A1111's infotext. Loads no torch."""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from importlib import metadata
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from fanlight.contract.limits import PROVENANCE_LIMIT_BYTES
from fanlight.contract.lora_tag import lora_tag
from fanlight.contract.prompt import IGNORE, NO_NORM, NONE, PLAIN
from fanlight.contract.schedulers import SCHEDULE_TITLES, SCHEDULERS
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import NodeFault
from services.diffusion.engine.generation import A1111_OPTIONS, Generation
from services.diffusion.models.entries import KINDS, Entry
from services.weights.references.tensors import sha256_of

WEIGHTS = (".safetensors", ".pt", ".bin", ".ckpt")
# The weight store names its objects by their digest, and its views are links to them.
_OBJECT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    # Within the model, such as `unet/diffusion_pytorch_model.safetensors`.
    path: str
    sha256: str


Digests = Callable[[Entry], tuple[FileDigest, ...]]


class WeightDigests:
    """sha256 of weight files: read from the weight store's names, else computed once.

    For any thread. A file is read again when its size or time has changed.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], str] = {}
        self._read_lock = threading.Lock()

    def of(self, entry: Entry) -> tuple[FileDigest, ...]:
        """Of all files; reads those that are new, which may take a while. NodeFault where one cannot be read."""
        root = entry.path
        try:
            return tuple(
                FileDigest(path=file.relative_to(root).as_posix() if file != root else file.name, sha256=self._of(file))
                for file in weight_files(root)
            )
        except OSError as error:
            raise NodeFault(f"the weights of {entry.id} cannot be read") from error

    def known(self, entry: Entry) -> str:
        """Of a model in one file, where it costs nothing to get; else empty."""
        try:
            files = weight_files(entry.path)
            return (_digest_in_name(files[0]) or self._known.get(_stat_key(files[0]), "")) if len(files) == 1 else ""
        except OSError:
            return ""

    def named(self, entry: Entry) -> str:
        """Of a model in one file that the weight store names by its digest, so that it never changes; else empty."""
        try:
            files = weight_files(entry.path)
            return _digest_in_name(files[0]) if len(files) == 1 else ""
        except OSError:
            return ""

    def _of(self, file: Path) -> str:
        if named := _digest_in_name(file):
            return named
        key = _stat_key(file)
        with self._read_lock:
            if key not in self._known:
                self._known[key] = sha256_of(file)
            return self._known[key]


def entries_of(generation: Generation) -> Sequence[Entry]:
    """Every model that the image is made with, once."""
    entries: list[Entry] = [generation.checkpoint]
    entries += [control.controlnet for control in generation.controls]
    entries += [use.entry for use in generation.loras]
    entries += generation.embeddings
    entries += [generation.vae] if generation.vae else []
    return list(dict.fromkeys(entries))


def weight_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    return sorted(file for file in root.rglob("*") if file.suffix in WEIGHTS and file.is_file())


def _digest_in_name(file: Path) -> str:
    name = file.resolve().name
    return name if _OBJECT.fullmatch(name) else ""


def _stat_key(file: Path) -> tuple[Path, int, int]:
    stat = file.stat()
    return file, stat.st_size, stat.st_mtime_ns


PACKAGES = ("fanlight", "torch", "diffusers", "tokenizers", "safetensors", "numpy")


def provenance_json(
    generation: Generation,
    effective: diffusion_pb2.GenerateRequest,
    entries: tuple[Entry, ...],
    digests: Digests,
    *,
    device: str,
    dtype: str,
    warnings: Sequence[str] = (),
    vae_dtype: str = "",
) -> str:
    """`effective`: the request with all defaults filled in; sent again with the same images it gives the same image."""
    content = {
        "parameters": MessageToDict(effective, preserving_proto_field_name=True),
        "images": dict(generation.image_digests),
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
        **({"warnings": list(warnings)} if warnings else {}),
        "vae_dtype": vae_dtype,
    }
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"))


def for_record(provenance: str) -> str:
    """The provenance for the job's record; empty where it is too large for one, as only the file then holds it."""
    return provenance if len(provenance) <= PROVENANCE_LIMIT_BYTES else ""


def versions() -> dict[str, str]:
    return {package: version_of(package) for package in PACKAGES}


def version_of(package: str) -> str:
    """Empty where the package is not installed as a distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def default_of(option: str) -> object:
    """None for one without a default."""
    own = Generation.__dataclass_fields__.get(option)
    return None if own is None or own.default is MISSING else own.default


# Brackets and backslashes, which are syntax to A1111.
_MARKS = re.compile(r"[()\[\]\\]")
# As A1111 writes them.
_EMPHASES = {NO_NORM: "No norm", IGNORE: "Ignore", NONE: "None"}
# The digits of sha256 by which A1111 names a file.
_SHORT_HASH_LENGTH = 10


def infotext(generation: Generation, digests: Digests, *, version: str) -> str:
    """The parameters as A1111 writes them, for its tools, Civitai and others."""
    lines = [_prompt_with_tags(generation)]
    if generation.negative_prompt:
        lines.append(f"Negative prompt: {_as_a1111(generation.negative_prompt, generation)}")
    fields = [f"{name}: {_quoted(value)}" for name, value in _infotext_fields(generation, digests, version)]
    return "\n".join([*lines, ", ".join(fields)])


def _prompt_with_tags(generation: Generation) -> str:
    tags = []
    for use in generation.loras:
        tags.append(lora_tag(use.entry.id, unet_weight=use.unet_weight, text_weight=use.text_weight))
    return " ".join(part for part in (_as_a1111(generation.prompt, generation), *tags) if part)


def _as_a1111(prompt: str, generation: Generation) -> str:
    """As A1111 would have to be given it: what is text in a plain prompt is escaped."""
    return _MARKS.sub(r"\\\g<0>", prompt) if generation.prompt_syntax == PLAIN else prompt


def _infotext_fields(generation: Generation, digests: Digests, version: str) -> Iterable[tuple[str, str]]:
    yield "Steps", str(generation.steps)
    yield "Sampler", SCHEDULERS[generation.scheduler].a1111 or generation.scheduler
    if generation.noise_schedule:
        yield "Schedule type", SCHEDULE_TITLES[generation.noise_schedule]
    yield "CFG scale", f"{generation.guidance_scale:g}"
    yield "Seed", str(generation.seed)
    yield "Size", f"{generation.width_px}x{generation.height_px}"
    yield "Model hash", _short_hash(digests(generation.checkpoint))
    yield "Model", generation.checkpoint.id
    if generation.vae:
        yield "VAE hash", _short_hash(digests(generation.vae))
        yield "VAE", generation.vae.id
    # Only values that are not the default, as A1111 does.
    for option, title in A1111_OPTIONS.items():
        value = getattr(generation, option)
        if value != default_of(option) and option not in _without_effect(generation):
            yield title, _EMPHASES.get(value) or (f"{value:g}" if isinstance(value, float) else str(value))
    yield from _mask_fields(generation)
    for number, control in enumerate(generation.controls):
        yield f"ControlNet {number}", _control_field(generation, number, control.controlnet.id)
    if generation.loras:
        yield "Lora hashes", _hashes({use.entry.id: digests(use.entry) for use in generation.loras})
    if separate := [entry for entry in generation.embeddings if not entry.bundled_in]:
        yield "TI hashes", _hashes({entry.id: digests(entry) for entry in separate})
    yield "Version", f"Fanlight {version}"


# A1111's words for what the request's fields say.
_CONTROL_MODES = {
    "balanced": "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
}
_RESIZE_MODES = {"stretch": "Just Resize", "crop": "Crop and Resize", "pad": "Resize and Fill"}
_FILLS = {"blurred": "fill", "noise": "latent noise", "nothing": "latent nothing"}


def _mask_fields(generation: Generation) -> Iterable[tuple[str, str]]:
    """Those that A1111 writes for inpainting."""
    if generation.mask_blur is None:
        return
    if generation.mask_blur:
        yield "Mask blur", f"{generation.mask_blur:g}"
    if generation.mask_invert:
        yield "Mask mode", "Inpaint not masked"
    if generation.mask_fill in _FILLS:
        yield "Masked content", _FILLS[generation.mask_fill]
    if generation.only_masked:
        yield "Inpaint area", "Only masked"
        yield "Masked area padding", str(generation.mask_padding)


def _without_effect(generation: Generation) -> tuple[str, ...]:
    """The option of `clip_skip`'s two that the checkpoint's kind does not take."""
    return ("clip_skip",) if generation.is_sdxl else ("sdxl_clip_skip",)


def _control_field(generation: Generation, number: int, net: str) -> str:
    control = generation.controls[number]
    mode = _CONTROL_MODES[control.mode or ("control" if generation.guess_mode else "balanced")]
    how = control.resize or generation.resize
    resize = f" Resize Mode: {_RESIZE_MODES[how]}," if how else ""
    return (
        f"Module: {control.annotator or 'none'}, Model: {net}, Weight: {control.scale:g},{resize}"
        f" Guidance Start: {control.start:g}, Guidance End: {control.end:g}, Control Mode: {mode}"
    )


def _hashes(files: Mapping[str, tuple[FileDigest, ...]]) -> str:
    return ", ".join(f"{name}: {_short_hash(digests)}" for name, digests in files.items())


def _short_hash(digests: tuple[FileDigest, ...]) -> str:
    """Of a model in several files, the UNet's."""
    unet = next((digest for digest in digests if digest.path.startswith("unet/")), None)
    main = unet or (digests[0] if digests else None)
    return main.sha256[:_SHORT_HASH_LENGTH] if main else ""


def _quoted(value: str) -> str:
    """Quoted, as A1111 does, where it would read as several fields."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",\n:") else value
