"""Models that are not on this machine: which of them a request may name, and fetching them before it is parsed.

Downloads run beside the device's work; only what is on disk whole is loaded. Knows no gRPC and no torch.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from fanlight.contract.generation import OFF, parsed_prompts
from fanlight.contract.needs import SAFETY_CHECKER
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, FanlightError, InvalidField, NotFound
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.entries import KINDS, CheckpointEntry, ControlNetEntry, Entry, controlnet_id
from services.diffusion.models.faults import CONTENT_ERRORS, UnusableModel, part_of
from services.diffusion.models.recipes import Recipe, UnfitFolder, shipped
from services.diffusion.models.scan import read_fetched
from services.kernel.logs import get_logger
from services.weights.planning.selection import Selection, choose
from services.weights.references.catalog import Catalog
from services.weights.references.manifest import Manifest
from services.weights.references.references import AirRef, CatalogRef, HubRef, S3Ref, UrlRef, parse
from services.weights.store.index import HeldModel
from services.weights.transfer.download import DownloadProgress

_FETCHABLE_KINDS = frozenset({"checkpoint", "controlnet", "lora", "vae", "embedding"})
_PACKAGED = "package:"
# The safety checker's name in the catalog.
CHECKER = "safety-checker"


class FetchMode(StrEnum):
    """What a request may make this worker fetch."""

    OFF = "off"
    # What Fanlight's catalog names, and the operator's own catalog files.
    CATALOG = "catalog"
    # Any reference to a hub, a Civitai model or a bucket; a server by its address only where hosts are allowed by name.
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """`recipe`: a checkpoint's, as single files of its family have it; its default size follows from it."""

    id: str
    # Its name in the catalog; a ControlNet's id is shorter.
    reference: str
    kind: str
    family: str
    size_bytes: int
    license: str
    recipe: Recipe | None = None
    # All of it is on disk.
    is_on_disk: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModels:
    """What may be fetched. `allows_hosts`: whether the operator has listed the hosts that may be contacted."""

    catalog: Catalog
    fetch: FetchMode
    allows_hosts: bool = False
    # Nothing is downloaded: only what the store holds already is offered.
    is_offline: bool = False

    @property
    def checker(self) -> str:
        """The safety checker's reference; empty where it may not be fetched."""
        entry = self.catalog.entries.get(CHECKER)
        is_known = entry is not None and entry.kind == SAFETY_CHECKER
        return CHECKER if is_known and self.fetch is not FetchMode.OFF else ""

    def offers(self) -> Sequence[RemoteModel]:
        """All models of the catalog, and `*` for each kind of which any reference may be fetched."""
        if self.fetch is FetchMode.OFF:
            return []
        offers = [_remote_model(entry) for entry in self._entries()]
        return [*offers, *_ANYTHING] if self.fetch is FetchMode.ANY else offers

    def reference(self, name: str, kind: str, family: str | None = None) -> str:
        """What to fetch for a name; empty for a name that is unknown, or that may not be fetched.

        `family`: what it must fit; None where that is not known yet.
        """
        if self.fetch is FetchMode.OFF:
            return ""
        if kind == "controlnet" and (short := self._controlnet(name, family)):
            return short
        try:
            parsed = parse(name)
        except InvalidField:
            return ""
        known = self.catalog.find(parsed)
        if known is not None:
            fits = known.kind == kind and (family is None or known.family in ("", family))
            return name if fits and not _is_packaged(known) else ""
        if self.fetch is not FetchMode.ANY or isinstance(parsed, CatalogRef):
            return ""
        is_allowed = isinstance(parsed, HubRef | AirRef | S3Ref) or (isinstance(parsed, UrlRef) and self.allows_hosts)
        return name if is_allowed else ""

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
            if entry.kind in _FETCHABLE_KINDS and not _is_packaged(entry):
                yield entry


# Any reference at all.
_ANYTHING = [
    RemoteModel(id="*", reference="*", kind=kind, family="", size_bytes=0, license="")
    for kind in sorted(_FETCHABLE_KINDS)
]


def _remote_model(entry: Manifest) -> RemoteModel:
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
    """About what is fetched for images with ControlNets if nothing is on disk."""
    try:
        chosen = choose(entry, Selection(pipeline="controlnet", allow_pickle=True))
    except FailedPrecondition:
        return 0
    return sum(choice.file.size_bytes or 0 for choice in chosen if choice.is_wanted)


def is_here(model: RemoteModel, catalog: ModelCatalog) -> bool:
    """Found on this machine, or fetched by this process already."""
    return any(
        model.id in (entry.id, entry.reference)
        and (isinstance(entry, CheckpointEntry) or catalog.family_of(entry) in ("", model.family))
        for entry in catalog.entries
    )


def _name(entry: Manifest) -> str:
    return entry.reference.removeprefix("catalog:")


def _is_packaged(entry: Manifest) -> bool:
    """It ships with Fanlight and is on every machine."""
    return any(source.startswith(_PACKAGED) for file in entry.files for source in file.sources)


log = get_logger()

Report = Callable[[DownloadProgress], None]


class Store(Protocol):
    """Where references come from; `services.weights.provision.Provision` is one."""

    def obtain(
        self, reference: str, pipeline: str = "", *, report: Report = ...
    ) -> contextlib.AbstractAsyncContextManager[Path]: ...

    def inventory(self) -> Sequence[HeldModel]: ...

    @property
    def link_bps(self) -> float: ...

    @property
    def room_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model that a request names, and the request's field that names it."""

    name: str
    kind: str
    field: str

    @property
    def part(self) -> str:
        """As failures name it."""
        return f"{self.kind}:{self.name}"


class Supply:
    def __init__(
        self,
        catalog: ModelCatalog,
        store: Store,
        remote: RemoteModels,
        *,
        readers: Executor,
        checker: Path | None = None,
        check_by_default: str = OFF,
    ) -> None:
        """`readers` run what blocks: reading headers and configs.

        `checker`: the operator's own safety checker, which is never fetched. `check_by_default`: what requests get that
        say nothing of it.
        """
        self._catalog = catalog
        self._checker, self._fetches_checker = checker, checker is None
        self._check_by_default = check_by_default
        self._store = store
        self._remote = remote
        self._readers = readers
        self._offers = remote.offers()

    @property
    def offers(self) -> Sequence[RemoteModel]:
        """What may be fetched, whether or not it was."""
        return self._offers

    def remote_models(self) -> list[RemoteModel]:
        """What could be fetched, or is on disk and was not used by this process yet."""
        on_disk = {
            reference.removeprefix("catalog:") for model in self._store.inventory() for reference in model.references
        }
        missing = (offer for offer in self._offers if not is_here(offer, self._catalog))
        return [replace(offer, is_on_disk=offer.reference in on_disk) for offer in missing]

    @property
    def can_check(self) -> bool:
        """Whether there is a safety checker, or it can be fetched."""
        if not self._fetches_checker:
            return True
        reference = self._remote.checker
        if not reference or not self._remote.is_offline:
            return bool(reference)
        held = {each.removeprefix("catalog:") for model in self._store.inventory() for each in model.references}
        return reference in held

    def checker_folder(self) -> Path | None:
        """None before a request has needed it."""
        return self._checker

    @property
    def link_bps(self) -> float:
        """The link's recent goodput in bits per second; 0 until something large was fetched."""
        return self._store.link_bps

    @property
    def room_bytes(self) -> int:
        """Bytes of this disk for prefetched weights that no request has named; 0 where nothing should be prefetched."""
        return self._store.room_bytes

    @contextlib.asynccontextmanager
    async def provided(self, request: diffusion_pb2.GenerateRequest, report: Report) -> AsyncIterator[None]:
        """While the context is open, all models that the checked request names are in the catalog and on this disk.

        Unknown names are left for the parser to refuse. Errors of fetching name the request's field.
        """
        pipeline = _pipeline(request)
        async with contextlib.AsyncExitStack() as stack:
            checkpoint: CheckpointEntry | None = None
            for model in _named_models(request, self._catalog.default_id):
                if reference := self._missing(model, checkpoint):
                    try:
                        await self._fetch(stack, reference, model, pipeline, report)
                    except FanlightError as error:
                        raise _within(error, model) from error
                if model.kind == "checkpoint":
                    checkpoint = self._checkpoint(model.name)
            await self._provide_checker(stack, request.safety_checker or self._check_by_default, report)
            yield

    async def _provide_checker(self, stack: contextlib.AsyncExitStack, mode: str, report: Report) -> None:
        """The safety checker, where the request needs it and the operator has named none. As any model, it is kept."""
        reference = self._remote.checker
        if mode == OFF or not self._fetches_checker or not reference:
            return
        try:
            self._checker = await stack.enter_async_context(self._store.obtain(reference, report=report))
        except FanlightError as error:
            raise _within(error, NamedModel(name=mode, kind=SAFETY_CHECKER, field=SAFETY_CHECKER)) from error

    def part_as_named(self, request: diffusion_pb2.GenerateRequest, part: str) -> str:
        """A part to blame by the name that the request has for it, as its needs have it: perhaps a reference."""
        checkpoint: CheckpointEntry | None = None
        for model in _named_models(request, self._catalog.default_id):
            entry = self._known(model, checkpoint)
            if isinstance(entry, CheckpointEntry):
                checkpoint = entry
            if entry is not None and model.name and part_of(entry) == part:
                return model.part
        return part

    async def prefetch(self, name: str, kind: str) -> None:
        """Prefetch a model to this disk before a request names it. Does nothing for a model that cannot be fetched."""
        reference = self._missing(NamedModel(name=name, kind=kind or "checkpoint", field="model"), None)
        if reference:
            async with self._store.obtain(reference):
                pass

    def _missing(self, model: NamedModel, checkpoint: CheckpointEntry | None) -> str:
        """The reference to fetch; empty for a local model, or an unknown name."""
        known = self._known(model, checkpoint)
        if known is not None:
            return known.reference
        return self._remote.reference(model.name, model.kind, checkpoint.base if checkpoint else None)

    def _known(self, model: NamedModel, checkpoint: CheckpointEntry | None) -> Entry | None:
        catalog = self._catalog
        try:
            if model.kind == "checkpoint":
                return catalog.checkpoint(model.name) if model.name else catalog.default()
            if checkpoint is None:
                return None
            find: dict[str, Callable[[str, CheckpointEntry], Entry]] = {
                "controlnet": catalog.controlnet,
                "lora": catalog.lora,
                "vae": catalog.vae,
                "embedding": catalog.embedding,
            }
            return find[model.kind](model.name, checkpoint)
        except (NotFound, FailedPrecondition):
            return None

    def _checkpoint(self, name: str) -> CheckpointEntry | None:
        known = self._known(NamedModel(name=name, kind="checkpoint", field="model"), None)
        return known if isinstance(known, CheckpointEntry) else None

    async def _fetch(
        self, stack: contextlib.AsyncExitStack, reference: str, model: NamedModel, pipeline: str, report: Report
    ) -> None:
        path = await stack.enter_async_context(self._store.obtain(reference, pipeline, report=report))
        loop = asyncio.get_running_loop()
        try:
            entry = await loop.run_in_executor(self._readers, read_fetched, path)
        except UnfitFolder as error:
            raise UnusableModel(f"{reference} cannot be used: {error}") from error
        except CONTENT_ERRORS as error:
            raise UnusableModel(f"{reference} cannot be used: it has what no model has") from error
        if entry is None or KINDS[type(entry)] != model.kind:
            raise UnusableModel(f"{reference} is no {model.kind} that this service can use")
        # A ControlNet keeps its usual short name.
        id_ = entry.id if isinstance(entry, ControlNetEntry) else model.name or entry.id
        self._catalog.add(replace(entry, id=id_, reference=reference), is_newer=True)


def _pipeline(request: diffusion_pb2.GenerateRequest) -> str:
    """As far as it decides which files are needed: a start image needs the VAE's encoder."""
    if request.HasField("mask"):
        return "inpaint"
    if request.HasField("image"):
        return "img2img"
    return "controlnet" if request.controls else "text2img"


def _named_models(request: diffusion_pb2.GenerateRequest, default_id: str) -> Iterator[NamedModel]:
    """The checkpoint first: what else is fetched depends on its family."""
    yield NamedModel(name=request.model or default_id, kind="checkpoint", field="model")
    for number, control in enumerate(request.controls):
        yield NamedModel(name=control.controlnet, kind="controlnet", field=f"controls[{number}].controlnet")
    for number, lora in enumerate(request.loras):
        yield NamedModel(name=lora.model, kind="lora", field=f"loras[{number}].model")
    for tag in parsed_prompts(request)["prompt"].loras:
        yield NamedModel(name=tag.name, kind="lora", field="prompt")
    if request.vae:
        yield NamedModel(name=request.vae, kind="vae", field="vae")
    for number, name in enumerate(request.embeddings):
        yield NamedModel(name=name, kind="embedding", field=f"embeddings[{number}]")


def _within(error: FanlightError, model: NamedModel) -> FanlightError:
    """The store's error names its own argument; this one names the request's field, and the source or the model."""
    named = type(error)(error.message, field=model.field, retry_after_s=error.retry_after_s)
    return named.of_part(error.part or model.part)
