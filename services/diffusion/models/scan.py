"""Finds the models in folders: diffusers' layout, single files, folders of parts; as A1111 sorts them or otherwise."""

from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import Entry
from services.diffusion.models.folders import (
    class_of,
    is_checkpoint,
    is_vae,
    read_checkpoint,
    read_controlnet,
    read_vae,
)
from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.single_files import (
    EMBEDDING_PICKLES,
    read_embedding_pickle,
    read_file,
    read_parts,
)
from services.kernel.logs import get_logger

log = get_logger()

# Folders of models are looked through this deep: `<root>/models/Lora/<author>/<name>`.
DEPTH_LIMIT = 4
FILES_LIMIT = 20_000
# The only folders where pickles are looked at; what is loaded of them is tensors alone.
_EMBEDDINGS = "embeddings"
_PARTS_OF_MODELS = frozenset({"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"})


def starter_folder() -> Path:
    """Where the model that ships with Fanlight lies."""
    return Path(str(resources.files("fanlight"))) / "starter"


def scan(roots: Iterable[Path], *, default_id: str = "") -> Catalogue:
    """All models at or under the roots; of several with one id the first. What is unfit is logged and left out."""
    entries = [entry for root in roots for entry in _entries(root, DEPTH_LIMIT)]
    return Catalogue(entries, default_id=default_id)


def read_path(path: Path) -> Entry | None:
    """The one model at a path: a folder or a file. None for what this service does not use; UnfitFolder."""
    if path.is_file():
        return read_embedding_pickle(path) if path.suffix in EMBEDDING_PICKLES else read_file(path)
    if is_checkpoint(path):
        return read_checkpoint(path)
    if class_of(path) == "ControlNetModel":
        return read_controlnet(path)
    if is_vae(path):
        return read_vae(path)
    return read_parts(path)


def read_fetched(path: Path) -> Entry | None:
    """As `read_path`, also where a repository's folder holds one file of weights and nothing that says what it is."""
    entry = read_path(path)
    files = list(path.glob("*.safetensors")) if path.is_dir() else []
    return read_path(files[0]) if entry is None and len(files) == 1 else entry


def _entries(path: Path, depth: int) -> Iterator[Entry]:
    try:
        entry = _read(path)
        children = _children(path) if entry is None and depth and path.is_dir() else []
    except (UnfitFolder, OSError) as reason:
        log.warning("model_left_out", folder=path.name, reason=str(reason))
        return
    if entry is not None:
        yield entry
    for child in children:
        yield from _entries(child, depth - 1)


def _read(path: Path) -> Entry | None:
    """None also for a folder that only looks like a model's part: there may be models in it."""
    try:
        return read_path(path)
    except UnfitFolder:
        if path.is_file() or is_checkpoint(path):
            raise
        return None


def _children(folder: Path) -> list[Path]:
    """What may be a model; folders of configs and of parts of models are none."""
    children = sorted(folder.iterdir())
    if len(children) > FILES_LIMIT:
        log.warning("folder_cut", folder=folder.name, files=len(children), limit=FILES_LIMIT)
    return [child for child in children[:FILES_LIMIT] if _may_be_model(child)]


def _may_be_model(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return path.suffix != ".config" and path.name not in _PARTS_OF_MODELS
    return path.suffix == ".safetensors" or (
        path.suffix in EMBEDDING_PICKLES and path.parent.name.lower() == _EMBEDDINGS
    )
