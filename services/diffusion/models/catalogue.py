"""The models that this service offers, found once when it starts. Loads none of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from services.diffusion.models.entries import (
    CheckpointEntry,
    ControlNetEntry,
    Shape,
    UnfitFolder,
    is_checkpoint,
    is_controlnet,
    read_checkpoint,
    read_controlnet,
)
from services.kernel.errors import InvalidField, NotFound
from services.kernel.logs import get_logger

log = get_logger()

# Folders of models are looked through this deep: `<root>/<author>/<name>`.
DEPTH_LIMIT = 2
_SD_BLOCKS = (320, 640, 1280, 1280)
# Families that everybody knows, by the width of their prompt embeddings; any other goes by its first checkpoint's id.
_KNOWN_FAMILIES = {768: "sd1", 1024: "sd2"}
NO_FAMILY = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Ids of checkpoints are unique; ids of ControlNets within a family."""

    checkpoints: Sequence[CheckpointEntry]
    controlnets: Sequence[ControlNetEntry]
    # Empty: the first checkpoint.
    default_id: str = ""

    @property
    def entries(self) -> Sequence[CheckpointEntry | ControlNetEntry]:
        return [*self.checkpoints, *self.controlnets]

    def default(self) -> CheckpointEntry:
        if not self.checkpoints:
            raise NotFound("no checkpoint lies on this machine", field="model")
        return self.checkpoint(self.default_id) if self.default_id else self.checkpoints[0]

    def checkpoint(self, model_id: str) -> CheckpointEntry:
        for entry in self.checkpoints:
            if entry.id == model_id:
                return entry
        known = ", ".join(entry.id for entry in self.checkpoints) or "none"
        raise NotFound(f"no checkpoint is called {_short(model_id)}; there are {known}", field="model")

    def controlnet(self, controlnet_id: str, checkpoint: CheckpointEntry) -> ControlNetEntry:
        """The ControlNet of that id that fits the checkpoint. NotFound; InvalidField where only others have it."""
        named = [entry for entry in self.controlnets if entry.id == controlnet_id]
        for entry in named:
            if entry.shape == checkpoint.shape:
                return entry
        if named:
            raise InvalidField(
                f"{controlnet_id} is for {self.family(named[0].shape)}, the checkpoint {checkpoint.id} is"
                f" {self.family(checkpoint.shape)}",
                field="controlnet",
            )
        known = ", ".join(entry.id for entry in self.controlnets_of(checkpoint)) or "none"
        raise NotFound(f"no ControlNet is called {_short(controlnet_id)}; there are {known}", field="controlnet")

    def controlnets_of(self, checkpoint: CheckpointEntry) -> list[ControlNetEntry]:
        return [entry for entry in self.controlnets if entry.shape == checkpoint.shape]

    def family(self, shape: Shape) -> str:
        """The same word for all models of one shape."""
        if shape.block_out_channels == _SD_BLOCKS and shape.cross_attention_dim in _KNOWN_FAMILIES:
            return _KNOWN_FAMILIES[shape.cross_attention_dim]
        return next((entry.id for entry in self.checkpoints if entry.shape == shape), NO_FAMILY)


def starter_folder() -> Path:
    """Where the model that ships with Fanlight lies."""
    return Path(str(resources.files("fanlight"))) / "starter"


def scan(roots: Iterable[Path], *, default_id: str = "") -> Catalogue:
    """All models at or under the roots; of several with one id the first. What is unfit is logged and left out."""
    checkpoints: dict[str, CheckpointEntry] = {}
    controlnets: dict[tuple[str, Shape], ControlNetEntry] = {}
    for folder in (folder for root in roots for folder in _model_folders(root, DEPTH_LIMIT)):
        try:
            if is_checkpoint(folder):
                checkpoint = read_checkpoint(folder)
                checkpoints.setdefault(checkpoint.id, checkpoint)
            else:
                controlnet = read_controlnet(folder)
                controlnets.setdefault((controlnet.id, controlnet.shape), controlnet)
        except UnfitFolder as reason:
            log.warning("model_left_out", folder=folder.name, reason=str(reason))
    return Catalogue(
        checkpoints=tuple(checkpoints.values()), controlnets=tuple(controlnets.values()), default_id=default_id
    )


def _model_folders(folder: Path, depth: int) -> Iterator[Path]:
    if _is_model(folder):
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            yield from _model_folders(child, depth - 1)


def _is_model(folder: Path) -> bool:
    try:
        return is_checkpoint(folder) or is_controlnet(folder)
    except UnfitFolder:
        return False  # some config.json of something else


def _short(text: str) -> str:
    """A name from a request, fit for a message."""
    return repr(text if len(text) <= 80 else text[:80] + "...")
