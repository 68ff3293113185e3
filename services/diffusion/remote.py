"""Models that are not on this machine and can be fetched: which names mean them, and what is known of them before."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry
from services.diffusion.models.names import controlnet_id
from services.diffusion.models.recipes import Recipe, shipped
from services.kernel.errors import InvalidField
from services.weights.catalog import Catalog
from services.weights.manifest import Manifest
from services.weights.references import AirRef, CatalogRef, HubRef, S3Ref, UrlRef, parse

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
    kind: str
    family: str
    size_bytes: int
    licence: str
    recipe: Recipe | None = None
    # All of it was fetched before.
    is_held: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """`allows_hosts`: whether the operator has named the hosts that may be asked."""

    catalog: Catalog
    fetch: Fetch
    allows_hosts: bool = False

    def models(self, catalogue: Catalogue, held: Collection[str]) -> Sequence[RemoteModel]:
        """What the catalog has beyond what was found here. `held`: the references that lie whole in the store."""
        if self.fetch is Fetch.OFF:
            return []
        told = ((entry, _told(entry)) for entry in self._entries())
        return [replace(model, is_held=_name(entry) in held) for entry, model in told if not _is_here(model, catalogue)]

    def reference(self, name: str, kind: str, family: str = "") -> str:
        """What to fetch for a name; empty for a name that means nothing elsewhere, or nothing that may be fetched."""
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
            return name if known.kind == kind and not _is_packaged(known) else ""
        if self.fetch is not Fetch.ANY or isinstance(wanted, CatalogRef):
            return ""
        is_taken = isinstance(wanted, HubRef | AirRef | S3Ref) or (isinstance(wanted, UrlRef) and self.allows_hosts)
        return name if is_taken else ""

    def _controlnet(self, name: str, family: str) -> str:
        """By short id, repository or A1111's name, one for each family."""
        short = controlnet_id(name)
        return next(
            (
                _name(entry)
                for entry in self._entries()
                if entry.kind == "controlnet" and controlnet_id(_name(entry)) == short and entry.family == family
            ),
            "",
        )

    def _entries(self) -> Iterator[Manifest]:
        for entry in self.catalog.entries.values():
            if entry.kind in _KINDS and not _is_packaged(entry):
                yield entry


def _told(entry: Manifest) -> RemoteModel:
    wanted = [file for file in entry.files if not file.skip]
    return RemoteModel(
        id=controlnet_id(_name(entry)) if entry.kind == "controlnet" else _name(entry),
        kind=entry.kind,
        family=entry.family,
        size_bytes=_needed_bytes({file.path: file.size_bytes or 0 for file in wanted}),
        licence=entry.licence,
        recipe=shipped(entry.family) if entry.kind == "checkpoint" and entry.family in _RECIPES else None,
    )


_RECIPES = frozenset({"sd1", "sd2", "sdxl", "refiner"})


def _needed_bytes(sizes: Mapping[str, int]) -> int:
    """Of a repository with several precisions, the smaller safetensors of each folder: about what is fetched."""
    least: dict[str, int] = {}
    for path, size in sizes.items():
        folder = path.rpartition("/")[0]
        if path.endswith(".safetensors") and "safety_checker" not in folder:
            least[folder] = min(size, least.get(folder, size))
    return sum(least.values())


def _is_here(model: RemoteModel, catalogue: Catalogue) -> bool:
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
