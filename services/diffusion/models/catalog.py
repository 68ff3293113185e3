"""The models on this machine that a request can name, and which of them fit each other. Loads none of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from fanlight.contract.names import find_name, shares_name
from fanlight.errors import FailedPrecondition, NotFound
from services.diffusion.models.entries import (
    FAMILIES,
    CheckpointEntry,
    ControlNetEntry,
    EmbeddingEntry,
    Entry,
    LoraEntry,
    Shape,
    VaeEntry,
    controlnet_aliases,
    controlnet_id,
)
from services.diffusion.models.left_out import LeftOutModel
from services.diffusion.models.unique_ids import fits_of

NO_FAMILY = "unknown"
_Named = TypeVar("_Named", CheckpointEntry, ControlNetEntry, LoraEntry, VaeEntry, EmbeddingEntry)


class ModelCatalog:
    """The models found at the start and those fetched since. For any thread.

    Ids are unique for each kind and what it fits, so that several families can have a `canny`.
    """

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        *,
        default_id: str = "",
        left_out: Sequence[LeftOutModel] = (),
        left_out_count: int = 0,
    ) -> None:
        """`default_id`: empty for the first checkpoint that a prompt is enough for.

        `left_out`: what was found and is not used, perhaps not all.
        """
        self.left_out = tuple(left_out)
        self.left_out_count = max(left_out_count, len(self.left_out))
        self._entries: dict[tuple[object, ...], Entry] = {}
        self.default_id = default_id
        # Counts the models added.
        self.revision = 0
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry, *, is_newer: bool = False) -> None:
        """Of several with one id the first stays, unless this one `is_newer`: fetched, perhaps again."""
        key = _key(entry)
        if is_newer or key not in self._entries:
            self._entries[key] = entry
            self.revision += 1

    @property
    def entries(self) -> Sequence[Entry]:
        kinds = (CheckpointEntry, ControlNetEntry, VaeEntry, LoraEntry, EmbeddingEntry)
        return sorted(self._entries.values(), key=lambda entry: kinds.index(type(entry)))

    @property
    def checkpoints(self) -> Sequence[CheckpointEntry]:
        return self._of(CheckpointEntry)

    @property
    def controlnets(self) -> Sequence[ControlNetEntry]:
        return self._of(ControlNetEntry)

    def default(self) -> CheckpointEntry:
        if self.default_id:
            return self.checkpoint(self.default_id)
        checkpoints = self.checkpoints
        if not checkpoints:
            raise NotFound("there is no checkpoint on this machine", field="model")
        return next((each for each in checkpoints if _needs_nothing_more(each)), checkpoints[0])

    def default_or_none(self) -> CheckpointEntry | None:
        """None where it is still to be fetched, or there is no checkpoint."""
        try:
            return self.default()
        except NotFound:
            return None

    def checkpoint(self, model_id: str) -> CheckpointEntry:
        return _the_one(self.checkpoints, model_id, kind="checkpoint", field="model")

    def controlnet(self, controlnet_id_: str, checkpoint: CheckpointEntry) -> ControlNetEntry:
        """The ControlNet of that id that fits the checkpoint. NotFound; FailedPrecondition where only others have it.

        `controlnet_id_`: its short id, its repository's name or A1111's name for it.
        """
        return self._fitting(
            ControlNetEntry,
            controlnet_id_,
            checkpoint,
            fits=lambda entry: entry.shape == checkpoint.shape,
            family=lambda entry: self.family(entry.shape),
            kind="ControlNet",
            field="controlnet",
        )

    def lora(self, lora_id: str, checkpoint: CheckpointEntry) -> LoraEntry:
        return self._fitting(
            LoraEntry,
            lora_id,
            checkpoint,
            fits=lambda entry: entry.cross_attention_dim in (0, checkpoint.shape.cross_attention_dim),
            family=lambda entry: self._family_of_width(entry.cross_attention_dim),
            kind="LoRA",
            field="model",
        )

    def vae(self, vae_id: str, checkpoint: CheckpointEntry) -> VaeEntry:
        return self._fitting(
            VaeEntry,
            vae_id,
            checkpoint,
            fits=lambda entry: not entry.is_tiny and _decodes(entry, checkpoint),
            family=lambda entry: "previews only" if entry.is_tiny else "latents of another shape",
            kind="VAE",
            field="vae",
        )

    def embedding(self, embedding_id: str, checkpoint: CheckpointEntry, *, field: str = "embeddings") -> EmbeddingEntry:
        return self._fitting(
            EmbeddingEntry,
            embedding_id,
            checkpoint,
            fits=lambda entry: has_widths(entry, checkpoint),
            family=lambda entry: self._family_or_width(sum(entry.widths)),
            kind="embedding",
            field=field,
        )

    def controlnets_of(self, checkpoint: CheckpointEntry) -> list[ControlNetEntry]:
        return [entry for entry in self.controlnets if entry.shape == checkpoint.shape]

    def embeddings_of(self, checkpoint: CheckpointEntry) -> list[EmbeddingEntry]:
        return [entry for entry in self._of(EmbeddingEntry) if has_widths(entry, checkpoint)]

    def tiny_vae_of(self, checkpoint: CheckpointEntry) -> VaeEntry | None:
        """The TAESD that its previews are made with, where there is one."""
        tiny = [entry for entry in self._of(VaeEntry) if entry.is_tiny and _decodes(entry, checkpoint)]
        named = "xl" if checkpoint.base in ("sdxl", "refiner") else "sd"
        return next((entry for entry in tiny if ("xl" in entry.id.lower()) == (named == "xl")), None)

    def family(self, shape: Shape) -> str:
        """The same name for all models of one shape; unknown families are named by their first checkpoint."""
        named = next((entry for entry in self.checkpoints if entry.shape == shape), None)
        if named is not None:
            return named.base or named.id
        is_known = shape.block_out_channels[0] in (320, 384)
        return FAMILIES.get(shape.cross_attention_dim, NO_FAMILY) if is_known else NO_FAMILY

    def _family_of_width(self, width: int) -> str:
        mine = next((each for each in self.checkpoints if each.shape.cross_attention_dim == width), None)
        return self.family(mine.shape) if mine else FAMILIES.get(width, NO_FAMILY)

    def _family_or_width(self, width: int) -> str:
        family = self._family_of_width(width)
        return family if family != NO_FAMILY else f"text encoders of width {width}"

    def family_of(self, entry: Entry) -> str:
        """The family that it belongs to or fits; empty where its file does not show it, so that all may fit."""
        if isinstance(entry, CheckpointEntry | ControlNetEntry):
            return self.family(entry.shape)
        if (isinstance(entry, LoraEntry) and not entry.cross_attention_dim) or (
            isinstance(entry, EmbeddingEntry) and not entry.widths
        ):
            return ""
        if isinstance(entry, LoraEntry):
            return self._family_of_width(entry.cross_attention_dim)
        if isinstance(entry, EmbeddingEntry):
            return self._family_of_width(sum(entry.widths))
        fitting = next((each for each in self.checkpoints if _decodes(entry, each)), None)
        return self.family(fitting.shape) if fitting else NO_FAMILY

    def _of(self, kind: type[_Named]) -> list[_Named]:
        return [entry for entry in tuple(self._entries.values()) if isinstance(entry, kind)]

    def _fitting(
        self,
        type_: type[_Named],
        name: str,
        checkpoint: CheckpointEntry,
        *,
        fits: Callable[[_Named], bool],
        family: Callable[[_Named], str],
        kind: str,
        field: str,
    ) -> _Named:
        """NotFound; FailedPrecondition where only models for other families have the name. Another node may have it."""
        entries = self._of(type_)
        named = _named(entries, name)
        if found := next((entry for entry in named if fits(entry)), None):
            return found
        if named:
            mine = self.family(checkpoint.shape)
            raise FailedPrecondition(
                f"{kind} {named[0].id} is for {family(named[0])}, the checkpoint {checkpoint.id} is {mine}", field=field
            )
        return _the_one([entry for entry in entries if fits(entry)], name, kind=kind, field=field)


def _the_one(entries: Sequence[_Named], name: str, *, kind: str, field: str) -> _Named:
    named = _named(entries, name)
    if not named:
        alike = [entry.id for entry in entries if shares_name(entry.id, name)]
        if len(alike) > 1:
            several = " and ".join(alike[:_KNOWN_LIMIT])
            raise NotFound(f"several have the name {_short(name)}: write {several}", field=field)
        known = ", ".join(entry.id for entry in entries[:_KNOWN_LIMIT]) or "none"
        more = f" and {len(entries) - _KNOWN_LIMIT} more" if len(entries) > _KNOWN_LIMIT else ""
        raise NotFound(f"no {kind} is called {_short(name)}; there are {known}{more}", field=field)
    return named[0]


# How many names an error lists.
_KNOWN_LIMIT = 40


def _named(entries: Sequence[_Named], name: str) -> list[_Named]:
    """By reference, or as the contract reads names; ControlNets also by their files' other names."""
    if by_reference := [entry for entry in entries if name and entry.reference == name]:
        return by_reference
    known = {entry.id: _other_names(entry) for entry in entries}
    id_ = find_name(known, name)
    if not id_ and any(isinstance(entry, ControlNetEntry) for entry in entries):
        id_ = find_name(known, controlnet_id(name))
    return [entry for entry in entries if id_ and entry.id == id_]


def _other_names(entry: Entry) -> Sequence[str]:
    if isinstance(entry, LoraEntry):
        return entry.aliases
    return controlnet_aliases(entry.id) if isinstance(entry, ControlNetEntry) else ()


def _needs_nothing_more(entry: CheckpointEntry) -> bool:
    """Than a prompt: no VAE, no image and no mask."""
    return entry.recipe.has_vae and not entry.is_inpainting and not entry.takes_aesthetic_score


def _key(entry: Entry) -> tuple[object, ...]:
    return type(entry), entry.id, fits_of(entry)


def _decodes(entry: VaeEntry, checkpoint: CheckpointEntry) -> bool:
    shape = checkpoint.shape
    return (entry.latent_factor, entry.latent_channels) == (shape.latent_factor, shape.latent_channels)


def has_widths(entry: EmbeddingEntry, checkpoint: CheckpointEntry) -> bool:
    """One width for each text encoder. A pickle's widths are checked when it is used."""
    widths = tuple(text.config["hidden_size"] for text in checkpoint.recipe.texts)
    return not entry.widths or entry.widths == widths


def _short(text: str) -> str:
    """A name from a request, cut for a message."""
    return repr(text if len(text) <= 80 else text[:80] + "...")
