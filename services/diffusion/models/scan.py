"""Finds models in folders: diffusers' layout, single files, folders of parts; in A1111's folders or others.

Whatever is there and is not used is listed with the reason. Reads no weights, loads no torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from fanlight.contract.names import ANY
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.config_defaults import whole_controlnet, whole_recipe, whole_vae
from services.diffusion.models.controlnet_files import refuse_other_controlnet, with_marks
from services.diffusion.models.embedding_files import EMBEDDING_PICKLES
from services.diffusion.models.entries import (
    LAYERS_LIMIT,
    CheckpointEntry,
    ControlNetEntry,
    Entry,
    VaeEntry,
    belongs_to_config,
    check_counts,
    checkpoint_entry,
    controlnet_entry,
    is_common,
    license_of,
    part_id,
    plain,
    weight_bytes,
)
from services.diffusion.models.faults import CONTENT_ERRORS
from services.diffusion.models.headers import told_by_first_bytes
from services.diffusion.models.left_out import LeftOutList
from services.diffusion.models.lora_entries import lora_folder_entry
from services.diffusion.models.lora_names import PARTS
from services.diffusion.models.peft_config import PEFT_FILE
from services.diffusion.models.recipes import TEXT_ENCODERS, UnfitFolder, from_folder, read_json
from services.diffusion.models.single_files import read_embedding_pickle, read_file, read_header, read_parts
from services.diffusion.models.unique_ids import ID_LIMIT_BYTES, with_unique_ids
from services.diffusion.models.unknown_files import PICKLES, SAFETENSORS, unread_file
from services.diffusion.models.vae_files import refuse_other_vae
from services.kernel.logs import get_logger

log = get_logger()

# How deep folders are searched, and how many files and folders of one folder and altogether.
DEPTH_LIMIT = 32
FILES_LIMIT = 20_000
ALL_FILES_LIMIT = 200_000
# Of the hub's cache: a folder of links to what lies beside it under names that say nothing.
_HUB_CACHE, _HUB_SNAPSHOTS = "models--", "snapshots"
# The only folders where pickles are read, with those below; nothing but tensors is read of them.
_EMBEDDINGS_FOLDER = "embeddings"


def starter_folder() -> Path:
    """The folder of the model that ships with Fanlight."""
    return Path(str(resources.files("fanlight"))) / "starter"


def scan(roots: Iterable[Path], *, default_id: str = "") -> ModelCatalog:
    """All models at or under the roots. What is not used is logged, and listed in the catalog's `left_out`."""
    left_out, found = LeftOutList(), list[Entry]()
    search, root_of = _Search(left_out), dict[Path, Path]()
    for root in roots:
        for entry in search.entries(root):
            root_of[entry.path] = root
            found.append(entry)
    entries, others = with_unique_ids(found)
    for entry, reason in others:
        left_out.add(entry.path, root_of[entry.path], reason)
    left_out.end()
    for entry in entries:
        if entry.note:
            log.info("model_noted", id=entry.id, file=entry.path.name, note=entry.note)
    return ModelCatalog(entries, default_id=default_id, left_out=left_out.found, left_out_count=left_out.count)


def read_path(path: Path) -> Entry | None:
    """The one model at a path: a folder or a file. None for a folder that is none; UnfitFolder for what is not used."""
    if path.is_file():
        return read_embedding_pickle(path) if path.suffix.lower() in EMBEDDING_PICKLES else read_file(path)
    if is_checkpoint(path):
        return read_checkpoint(path)
    kind = class_of(path)
    if kind == "ControlNetModel":
        return read_controlnet(path)
    if kind in _VAE_CLASSES:
        return read_vae(path)
    if kind and _own_weights(path):
        raise UnfitFolder(f"it is a {kind[:80]}, which is not supported")
    return read_parts(path) or lora_folder_entry(path)


def read_fetched(path: Path) -> Entry | None:
    """As `read_path`, also for a repository's folder with one file of weights and no config."""
    entry = read_path(path)
    files = list(path.glob("*.safetensors")) if path.is_dir() else []
    return read_path(files[0]) if entry is None and len(files) == 1 else entry


@dataclass(slots=True)
class _Search:
    """One walk through all roots."""

    left_out: LeftOutList
    # The folders that were searched, so that links to a folder above search nothing twice.
    seen: set[Path] = field(default_factory=set)
    visited: int = 0

    def entries(self, root: Path) -> Iterator[Entry]:
        is_embeddings = root.name.lower() == _EMBEDDINGS_FOLDER
        for entry in self._entries(root, root, DEPTH_LIMIT, is_embeddings=is_embeddings):
            # What would be called by the root's folder, which is every model's.
            is_of_root = entry.path.parent == root and entry.path.is_file() and is_common(plain(entry.path.name))
            yield replace(entry, id=plain(entry.path.name)) if is_of_root else entry

    def _entries(self, path: Path, root: Path, depth: int, *, is_embeddings: bool) -> Iterator[Entry]:
        """`is_embeddings`: in a folder of embeddings, or below one."""
        self.visited += 1
        try:
            if path.is_dir():
                if (real := path.resolve()) in self.seen:
                    return
                self.seen.add(real)
            entry = self._read(path, root, is_embeddings=is_embeddings)
            children = self._children(path, root) if path.is_dir() else []
        except CONTENT_ERRORS as error:
            self.left_out.add(path, root, _why(error))
            return
        if entry is not None:
            yield entry
        if children and not depth:
            self.left_out.add(path, root, f"it is more than {DEPTH_LIMIT} folders deep")
            return
        for child in children:
            below = is_embeddings or (child.name.lower() == _EMBEDDINGS_FOLDER and child.is_dir())
            yield from self._entries(child, root, depth - 1, is_embeddings=below)

    def _read(self, path: Path, root: Path, *, is_embeddings: bool) -> Entry | None:
        """None for what is left out too: there may be models in a folder that is none."""
        try:
            if not path.is_dir():
                _require_readable(path, is_embeddings=is_embeddings)
            return _checked(read_path(path))
        except CONTENT_ERRORS as error:
            if reason := _why(error):
                self.left_out.add(path, root, reason)
            return None

    def _children(self, folder: Path, root: Path) -> list[Path]:
        """What may be a model: of a model's own folder, what is not its own."""
        children = [child for child in sorted(folder.iterdir()) if _may_be_model(child)]
        if folder.name.startswith(_HUB_CACHE):
            children = [child for child in children if child.name == _HUB_SNAPSHOTS]
        if is_checkpoint(folder):
            children = [child for child in children if child.is_file() or child.name.startswith("controlnet")]
        elif _has_config(folder):
            own = _own_weights(folder)
            children = [child for child in children if child not in own]
        elif folder != root and folder.name in PARTS and not is_checkpoint(folder.parent):
            # With those of other parts it is one LoRA, which is the folder above.
            children = [child for child in children if child.name != PEFT_FILE]
        room = min(FILES_LIMIT, ALL_FILES_LIMIT - self.visited)
        if len(children) > room:
            log.warning("folder_truncated", folder=folder.name, files=len(children), limit=room)
            self.left_out.add(folder, root, f"it has {len(children)} files; {max(room, 0)} of them are searched")
        return children[: max(room, 0)]


def _why(error: Exception) -> str:
    """Without paths outside the models' folders; empty for what is no model at all."""
    if isinstance(error, UnfitFolder):
        return str(error)
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror or type(error).__name__}"
    return f"a config or header in it has what no model has ({type(error).__name__})"


def _require_readable(path: Path, *, is_embeddings: bool) -> None:
    """UnfitFolder for a file that is not opened, with an empty reason where it is no model at all."""
    ending, is_file = path.suffix.lower(), path.is_file()
    if ending != SAFETENSORS and not (is_embeddings and ending in EMBEDDING_PICKLES):
        raise UnfitFolder(unread_file(path, path.stat().st_size if is_file else 0))
    if not is_file:
        raise UnfitFolder("it is no ordinary file, or a link to nothing")


def _checked(entry: Entry | None) -> Entry | None:
    """UnfitFolder where its id, size or license is nothing that a worker could report."""
    if entry is None:
        return None
    if found := next((each for each in _NOT_IN_IDS if each in entry.id), ""):
        raise UnfitFolder(f"its name has {found!r}, which ids cannot have; rename it")
    if entry.id == ANY:
        raise UnfitFolder(f"its name is {ANY!r}, which stands for any model; rename it")
    if not entry.id or not entry.id.isprintable() or len(entry.id.encode(errors="replace")) > ID_LIMIT_BYTES:
        raise UnfitFolder(f"its name is empty, longer than {ID_LIMIT_BYTES} bytes or not printable; rename it")
    if not isinstance(entry.license, str) or not entry.license.isprintable() or len(entry.license) > LICENSE_LIMIT:
        raise UnfitFolder(f"its MANIFEST.json names a license that is no text of at most {LICENSE_LIMIT} characters")
    if isinstance(entry, CheckpointEntry | ControlNetEntry):
        # Equal shapes tell families: what cannot be compared would fail at the first lookup.
        hash(entry.shape)
    return entry


# Of an SPDX expression of all files of a model.
LICENSE_LIMIT = 1_000
# What references and LoRA tags are told by.
_NOT_IN_IDS = ":/<>"


def _may_be_model(path: Path) -> bool:
    """Not what is hidden, nor a folder of configs for a file beside it."""
    return not path.name.startswith(".") and not (path.suffix == ".config" and path.is_dir())


def _own_weights(folder: Path) -> frozenset[Path]:
    """The files that the folder's config is about."""
    return frozenset(
        child
        for child in folder.iterdir()
        if child.suffix.lower() in {SAFETENSORS, *PICKLES} and belongs_to_config(plain(child.name))
    )


# Of what a pipeline adds to the usual UNet, VAE and text encoders nothing is in the folder, but for ControlNets.
_PIPELINES = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint", "PAG", "PAGImg2Img",
    "PAGInpaint", "ControlNetPAG", "ControlNetPAGImg2Img", "ControlNetPAGInpaint")  # fmt: skip
_SD_PIPELINES = ("AttendAndExcite", "DiffEdit", "ModelEditing", "Panorama", "Paradigms", "Pix2PixZero", "SAG")
PIPELINE_CLASSES = frozenset({
    *(f"StableDiffusion{name}Pipeline" for name in (*_PIPELINES, *_SD_PIPELINES)),
    *(f"StableDiffusionXL{name}Pipeline" for name in _PIPELINES),
    "StableDiffusionPipelineSafe",
    "StableDiffusionInpaintPipelineLegacy",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
})  # fmt: skip

_VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def is_checkpoint(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def class_of(folder: Path) -> str:
    """The class that the folder's config.json names; empty where there is none. UnfitFolder."""
    file = folder / "config.json"
    if not file.is_file():
        return ""
    config = read_json(file)
    named = config.get("_class_name")
    if named is None and isinstance(config.get("architectures"), list):
        # As transformers names it.
        named = next(iter(config["architectures"]), None)
    if named is not None and not isinstance(named, str):
        raise UnfitFolder(f"config.json names its class as {str(named)[:80]}, which is no name")
    return named or ""


def _has_config(folder: Path) -> bool:
    """Whether the files in it belong to a config, which may be damaged."""
    try:
        return bool(class_of(folder))
    except UnfitFolder:
        return True


def read_checkpoint(folder: Path) -> CheckpointEntry:
    """UnfitFolder where it is not a Stable Diffusion that this service can run."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINE_CLASSES:
        raise UnfitFolder(f"{str(pipeline)[:100]} is not supported")
    entry = checkpoint_entry(folder, whole_recipe(from_folder(folder)), weight_bytes(folder))
    for part in ("unet", "vae", *(text for text, _ in TEXT_ENCODERS if (folder / text).is_dir())):
        _require_weights(folder / part, f"its {part}")
    return entry


def _require_weights(folder: Path, what: str) -> None:
    """UnfitFolder for a folder without safetensors, or with what only has their name."""
    if files := list(folder.glob("*.safetensors")):
        if found := next(((file.name, told) for file in files if (told := told_by_first_bytes(file))), None):
            raise UnfitFolder(f"{what} cannot be used: {' '.join(found)}")
        return
    if any(child.suffix.lower() in PICKLES for child in folder.iterdir()):
        raise UnfitFolder(f"{what} has pickles only, which are not loaded; convert them to .safetensors")
    raise UnfitFolder(f"{what} has no .safetensors")


def read_controlnet(folder: Path) -> ControlNetEntry:
    """UnfitFolder where its config is not a ControlNet's, or its tensors are another kind's."""
    config = whole_controlnet(read_json(folder / "config.json"))
    entry = controlnet_entry(folder, config, weight_bytes(folder))
    _require_weights(folder, "it")
    names = read_header(folder).shapes
    refuse_other_controlnet(names)
    return with_marks(entry, names)


def read_vae(folder: Path) -> VaeEntry:
    """UnfitFolder where its config is not a VAE's."""
    config = read_json(folder / "config.json")
    is_tiny = config["_class_name"] == "AutoencoderTiny"
    blocks = config.get("decoder_block_out_channels") if is_tiny else whole_vae(config)["block_out_channels"]
    try:
        channels, factor = int(config.get("latent_channels", 4)), 2 ** (len(blocks) - 1) if blocks else 8
        check_counts([channels, factor], LAYERS_LIMIT)
    except (TypeError, ValueError) as error:
        raise UnfitFolder("its config lacks what a VAE has") from error
    _require_weights(folder, "it")
    refuse_other_vae(read_header(folder).shapes)
    return VaeEntry(
        id=part_id(folder / "model"),
        path=folder,
        latent_factor=factor,
        latent_channels=channels,
        is_tiny=is_tiny,
        size_bytes=weight_bytes(folder),
        license=license_of(folder),
    )
