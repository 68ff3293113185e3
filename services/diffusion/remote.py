"""Models that are not on this machine and can be fetched: which names mean them, and what is known of them before."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fanlight.errors import FailedPrecondition, InvalidField
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry
from services.diffusion.models.names import controlnet_id
from services.diffusion.models.recipes import Recipe, shipped
from services.weights.catalog import Catalog
from services.weights.manifest import Manifest
from services.weights.references import AirRef, CatalogRef, HubRef, S3Ref, UrlRef, parse
from services.weights.selection import Wish, choose

_KINDS = frozenset({"checkpoint", "controlnet", "lora", "vae", "embedding"})
_PACKAGED = "package:"


class Fetch(StrEnum):
    """What a request may make this worker fetch."""

    OFF = "off"
    # What Fanlight's catalog names, and the operator's own catalog files.
    CATALOG = "catalog"
    # Any reference to a hub, a Civitai model or a bucket; a server by its address only where hosts are allowed by name.
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """`recipe`: of a checkpoint, what single files of its family have; the size it paints at is told from it."""

    id: str
    # What the catalog calls it; a ControlNet's id is short.
    reference: str
    kind: str
    family: str
    size_bytes: int
    license: str
    recipe: Recipe | None = None
    # All of it was fetched before.
    is_held: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """`allows_hosts`: whether the operator has named the hosts that may be asked."""

    catalog: Catalog
    fetch: Fetch
    allows_hosts: bool = False

    def offers(self) -> Sequence[RemoteModel]:
        """All that the catalog has, and `*` for each kind of which any reference is taken."""
        if self.fetch is Fetch.OFF:
            return []
        offers = [_told(entry) for entry in self._entries()]
        return [*offers, *_ANYTHING] if self.fetch is Fetch.ANY else offers

    def reference(self, name: str, kind: str, family: str | None = None) -> str:
        """What to fetch for a name; empty for a name that means nothing elsewhere, or nothing that may be fetched.

        `family`: what it must fit; None where that is not known yet.
        """
        if self.fetch is Fetch.OFF:
            return ""
        if kind == "controlnet" and (short := self._controlnet(name, family)):
            return short
        try:
            wanted = parse(name)
        except InvalidField:
            return ""
        known = self.catalog.find(wanted)
        if known is not None:
            fits = known.kind == kind and (family is None or known.family in ("", family))
            return name if fits and not _is_packaged(known) else ""
        if self.fetch is not Fetch.ANY or isinstance(wanted, CatalogRef):
            return ""
        is_taken = isinstance(wanted, HubRef | AirRef | S3Ref) or (isinstance(wanted, UrlRef) and self.allows_hosts)
        return name if is_taken else ""

    def _controlnet(self, name: str, family: str | None) -> str:
        """By short id, repository or A1111's name."""
        short = controlnet_id(name)
        return next(
            (
                _name(entry)
                for entry in self._entries()
                if entry.kind == "controlnet"
                and controlnet_id(_name(entry)) == short
                and family in (None, entry.family)
            ),
            "",
        )

    def _entries(self) -> Iterator[Manifest]:
        for entry in self.catalog.entries.values():
            if entry.kind in _KINDS and not _is_packaged(entry):
                yield entry


# Stands for every reference that may be written.
_ANYTHING = [
    RemoteModel(id="*", reference="*", kind=kind, family="", size_bytes=0, license="") for kind in sorted(_KINDS)
]


def _told(entry: Manifest) -> RemoteModel:
    return RemoteModel(
        reference=_name(entry),
        id=controlnet_id(_name(entry)) if entry.kind == "controlnet" else _name(entry),
        kind=entry.kind,
        family=entry.family,
        size_bytes=_needed_bytes(entry),
        license=entry.license,
        recipe=shipped(entry.family) if entry.kind == "checkpoint" and entry.family in _RECIPES else None,
    )


_RECIPES = frozenset({"sd1", "sd2", "sdxl", "refiner"})


def _needed_bytes(entry: Manifest) -> int:
    """About what is fetched for pictures with ControlNets, and nothing held."""
    try:
        chosen = choose(entry, Wish(pipeline="controlnet", allow_pickle=True))
    except FailedPrecondition:
        return 0
    return sum(choice.file.size_bytes or 0 for choice in chosen if choice.is_wanted)


def is_here(model: RemoteModel, catalogue: Catalogue) -> bool:
    """Found on this machine, or fetched by this process already."""
    return any(
        model.id in (entry.id, entry.reference)
        and (isinstance(entry, CheckpointEntry) or catalogue.family_of(entry) == model.family)
        for entry in catalogue.entries
    )


def _name(entry: Manifest) -> str:
    return entry.reference.removeprefix("catalog:")


def _is_packaged(entry: Manifest) -> bool:
    """It came with Fanlight, and lies on every machine."""
    return any(source.startswith(_PACKAGED) for file in entry.files for source in file.sources)
