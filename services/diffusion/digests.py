"""sha256 of the files that a picture is painted from: read off the weight store's names, else computed once."""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fanlight.errors import NodeFault
from services.diffusion.generation import Generation
from services.diffusion.models.entries import Entry
from services.weights.files import sha256_of

WEIGHTS = (".safetensors", ".pt", ".bin", ".ckpt")
# The weight store's objects are called by their digest, and its views are links to them.
_OBJECT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    # Within the model, such as `unet/diffusion_pytorch_model.safetensors`.
    path: str
    sha256: str


class WeightDigests:
    """May be asked from any thread. A file is read again when its size or time has changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], str] = {}
        self._one_reads = threading.Lock()

    def of(self, entry: Entry) -> tuple[FileDigest, ...]:
        """Reads gigabytes where they are new. NodeFault where they cannot be read."""
        root = entry.path
        try:
            return tuple(
                FileDigest(path=file.relative_to(root).as_posix() if file != root else file.name, sha256=self._of(file))
                for file in weight_files(root)
            )
        except OSError as error:
            raise NodeFault(f"the weights of {entry.id} cannot be read") from error

    def known(self, entry: Entry) -> str:
        """Of a model in one file, where it costs nothing to tell; else empty."""
        try:
            files = weight_files(entry.path)
            return (_named(files[0]) or self._known.get(_key(files[0]), "")) if len(files) == 1 else ""
        except OSError:
            return ""

    def named(self, entry: Entry) -> str:
        """Of a model in one file, where its name in the weight store says it: the answer never changes. Else empty."""
        try:
            files = weight_files(entry.path)
            return _named(files[0]) if len(files) == 1 else ""
        except OSError:
            return ""

    def _of(self, file: Path) -> str:
        if named := _named(file):
            return named
        key = _key(file)
        with self._one_reads:
            if key not in self._known:
                self._known[key] = sha256_of(file)
            return self._known[key]


def entries_of(generation: Generation) -> Sequence[Entry]:
    """Every model that has a part in the picture, once."""
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


def _named(file: Path) -> str:
    name = file.resolve().name
    return name if _OBJECT.fullmatch(name) else ""


def _key(file: Path) -> tuple[Path, int, int]:
    stat = file.stat()
    return file, stat.st_size, stat.st_mtime_ns
