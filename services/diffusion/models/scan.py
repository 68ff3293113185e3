"""Finds models in folders: diffusers' layout, single files, folders of parts; in A1111's folders or others.

Reads no weights, loads no torch.
"""

from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from fanlight.contract.limits import NAME_LIMIT_BYTES
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.entries import (
    LAYERS_LIMIT,
    CheckpointEntry,
    ControlNetEntry,
    Entry,
    VaeEntry,
    check_counts,
    checkpoint_entry,
    controlnet_entry,
    license_of,
    part_id,
    weight_bytes,
)
from services.diffusion.models.faults import CONTENT_ERRORS
from services.diffusion.models.recipes import UnfitFolder, from_folder, read_json
from services.diffusion.models.single_files import (
    EMBEDDING_PICKLES,
    read_embedding_pickle,
    read_file,
    read_parts,
)
from services.kernel.logs import get_logger

log = get_logger()

# How deep folders are searched: `<root>/models/Lora/<author>/<name>`.
DEPTH_LIMIT = 4
FILES_LIMIT = 20_000
# The only folders where pickles are read; nothing but tensors is loaded from them.
_EMBEDDINGS_FOLDER = "embeddings"
_PARTS_OF_MODELS = frozenset({"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"})


def starter_folder() -> Path:
    """The folder of the model that ships with Fanlight."""
    return Path(str(resources.files("fanlight"))) / "starter"


def scan(roots: Iterable[Path], *, default_id: str = "") -> ModelCatalog:
    """All models at or under the roots; of several with one id the first. Unusable ones are logged and skipped."""
    seen: set[Path] = set()
    entries = [entry for root in roots for entry in _entries(root, DEPTH_LIMIT, seen)]
    return ModelCatalog(entries, default_id=default_id)


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
    """As `read_path`, also for a repository's folder with one file of weights and no config."""
    entry = read_path(path)
    files = list(path.glob("*.safetensors")) if path.is_dir() else []
    return read_path(files[0]) if entry is None and len(files) == 1 else entry


def _entries(path: Path, depth: int, seen: set[Path]) -> Iterator[Entry]:
    """`seen`: the folders that were searched, so that links to a folder above search nothing twice."""
    try:
        if path.is_dir():
            if (real := path.resolve()) in seen:
                return
            seen.add(real)
        entry = _read(path)
        children = _children(path) if entry is None and depth and path.is_dir() else []
    except CONTENT_ERRORS as reason:
        log.warning("model_skipped", folder=path.name, reason=str(reason))
        return
    if entry is not None:
        yield entry
    for child in children:
        yield from _entries(child, depth - 1, seen)


def _read(path: Path) -> Entry | None:
    """None also for a folder that looks like a model but is not: there may be models in it."""
    try:
        return _checked(read_path(path))
    except UnfitFolder:
        if path.is_file() or is_checkpoint(path):
            raise
        return None
    except OSError:
        raise
    except CONTENT_ERRORS as error:
        why = f"a config or header in it has what no model has ({type(error).__name__})"
        if path.is_file() or is_checkpoint(path):
            raise UnfitFolder(why) from error
        log.warning("model_skipped", folder=path.name, reason=why)
        return None


def _checked(entry: Entry | None) -> Entry | None:
    """UnfitFolder where its id, size or license is nothing that a worker could report."""
    if entry is None:
        return None
    if found := next((each for each in _NOT_IN_IDS if each in entry.id), ""):
        raise UnfitFolder(f"its name has {found!r}, which ids cannot have; rename it")
    if not entry.id or not entry.id.isprintable() or len(entry.id.encode(errors="replace")) > NAME_LIMIT_BYTES:
        raise UnfitFolder(f"its name is empty, longer than {NAME_LIMIT_BYTES} bytes or not printable; rename it")
    if not isinstance(entry.license, str) or not entry.license.isprintable():
        raise UnfitFolder("its MANIFEST.json names a license that is no text")
    if isinstance(entry, CheckpointEntry | ControlNetEntry):
        # Equal shapes tell families: what cannot be compared would fail at the first lookup.
        hash(entry.shape)
    return entry


# What references and LoRA tags are told by.
_NOT_IN_IDS = ":/<>"


def _children(folder: Path) -> list[Path]:
    """What may be a model: not folders of configs, nor of parts of models."""
    children = sorted(folder.iterdir())
    if len(children) > FILES_LIMIT:
        log.warning("folder_truncated", folder=folder.name, files=len(children), limit=FILES_LIMIT)
    return [child for child in children[:FILES_LIMIT] if _may_be_model(child)]


def _may_be_model(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return path.suffix != ".config" and path.name not in _PARTS_OF_MODELS
    return path.suffix == ".safetensors" or (
        path.suffix in EMBEDDING_PICKLES and path.parent.name.lower() == _EMBEDDINGS_FOLDER
    )


PIPELINE_CLASSES = frozenset(
    f"StableDiffusion{name}Pipeline"
    for name in ("", "ControlNet", "Img2Img", "Inpaint", "XL", "XLImg2Img", "XLInpaint", "XLControlNet")
)

_VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def is_checkpoint(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def class_of(folder: Path) -> str:
    """The class that the folder's config.json names; empty where there is none."""
    file = folder / "config.json"
    return str(read_json(file).get("_class_name", "")) if file.is_file() else ""


def read_checkpoint(folder: Path) -> CheckpointEntry:
    """UnfitFolder where it is not a Stable Diffusion that this service can run."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINE_CLASSES:
        raise UnfitFolder(f"{pipeline} is not supported")
    return checkpoint_entry(folder, from_folder(folder), weight_bytes(folder))


def read_controlnet(folder: Path) -> ControlNetEntry:
    """UnfitFolder where its config is not a ControlNet's."""
    return controlnet_entry(folder, read_json(folder / "config.json"), weight_bytes(folder))


def is_vae(folder: Path) -> bool:
    return class_of(folder) in _VAE_CLASSES


def read_vae(folder: Path) -> VaeEntry:
    """UnfitFolder where its config is not a VAE's."""
    config = read_json(folder / "config.json")
    is_tiny = config["_class_name"] == "AutoencoderTiny"
    blocks = config.get("decoder_block_out_channels" if is_tiny else "block_out_channels")
    try:
        channels, factor = int(config.get("latent_channels", 4)), 2 ** (len(blocks) - 1) if blocks else 8
        check_counts([channels, factor], LAYERS_LIMIT)
    except (TypeError, ValueError) as error:
        raise UnfitFolder("its config lacks what a VAE has") from error
    return VaeEntry(
        id=part_id(folder / "model"),
        path=folder,
        latent_factor=factor,
        latent_channels=channels,
        is_tiny=is_tiny,
        size_bytes=weight_bytes(folder),
        license=license_of(folder),
    )
