"""Brings what a request names to this machine before it is parsed, and keeps it there while it is painted.

Downloads run beside the device's work; only what lies here whole is ever loaded. Knows no gRPC and no torch.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fanlight.contract.prompt import read_prompt
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, FanlightError, NotFound
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry, Entry
from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.scan import read_fetched
from services.diffusion.provenance import KINDS
from services.diffusion.remote import Remote, RemoteModel, is_here
from services.kernel.logs import get_logger
from services.weights.inventory import HeldModel
from services.weights.targets import Progress

log = get_logger()

Report = Callable[[Progress], None]


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
class Wanted:
    """A model that a request names."""

    name: str
    kind: str
    field: str


class Supply:
    def __init__(self, catalogue: Catalogue, store: Store, remote: Remote, *, readers: Executor) -> None:
        """`readers` do what blocks: headers and configs are read on them."""
        self._catalogue = catalogue
        self._store = store
        self._remote = remote
        self._readers = readers
        self._offers = remote.offers()

    @property
    def offers(self) -> Sequence[RemoteModel]:
        """What may be fetched, whatever was."""
        return self._offers

    def remote_models(self) -> list[RemoteModel]:
        """What could be fetched, or was fetched once and is not in use here yet."""
        held = {
            reference.removeprefix("catalog:") for model in self._store.inventory() for reference in model.references
        }
        missing = (offer for offer in self._offers if not is_here(offer, self._catalogue))
        return [replace(offer, is_held=offer.reference in held) for offer in missing]

    @property
    def link_bps(self) -> float:
        """What the link has lately given; 0 until something large was fetched."""
        return self._store.link_bps

    @property
    def room_bytes(self) -> int:
        """What of this disk weights may fill that nobody has asked for; 0 where nothing should come unasked."""
        return self._store.room_bytes

    @contextlib.asynccontextmanager
    async def provided(self, request: diffusion_pb2.GenerateRequest, report: Report) -> AsyncIterator[None]:
        """While this is open, all that the request, which was checked, names is in the catalogue and on this disk.

        Names that mean nothing anywhere are left for the parser to refuse. Errors of fetching name the request's field.
        """
        pipeline = _pipeline(request)
        async with contextlib.AsyncExitStack() as kept:
            checkpoint: CheckpointEntry | None = None
            for wanted in _wanted(request, self._catalogue.default_id):
                if reference := self._missing(wanted, checkpoint):
                    try:
                        await self._bring(kept, reference, wanted, pipeline, report)
                    except FanlightError as error:
                        raise _within(error, wanted.field) from error
                if wanted.kind == "checkpoint":
                    checkpoint = self._checkpoint(wanted.name)
            yield

    async def fetch_ahead(self, name: str, kind: str) -> None:
        """Bring a model to this disk before anybody asks for it here. What nobody offers is left alone."""
        reference = self._missing(Wanted(name=name, kind=kind or "checkpoint", field="model"), None)
        if reference:
            async with self._store.obtain(reference):
                log.info("model_fetched_ahead", kind=kind, id=name)

    def _missing(self, wanted: Wanted, checkpoint: CheckpointEntry | None) -> str:
        """The reference to fetch; empty for what is this machine's own, or unknown everywhere."""
        known = self._known(wanted, checkpoint)
        if known is not None:
            return known.reference
        return self._remote.reference(wanted.name, wanted.kind, checkpoint.base if checkpoint else None)

    def _known(self, wanted: Wanted, checkpoint: CheckpointEntry | None) -> Entry | None:
        catalogue = self._catalogue
        try:
            if wanted.kind == "checkpoint":
                return catalogue.checkpoint(wanted.name) if wanted.name else catalogue.default()
            if checkpoint is None:
                return None
            find: dict[str, Callable[[str, CheckpointEntry], Entry]] = {
                "controlnet": catalogue.controlnet,
                "lora": catalogue.lora,
                "vae": catalogue.vae,
                "embedding": catalogue.embedding,
            }
            return find[wanted.kind](wanted.name, checkpoint)
        except (NotFound, FailedPrecondition):
            return None

    def _checkpoint(self, name: str) -> CheckpointEntry | None:
        known = self._known(Wanted(name=name, kind="checkpoint", field="model"), None)
        return known if isinstance(known, CheckpointEntry) else None

    async def _bring(
        self, kept: contextlib.AsyncExitStack, reference: str, wanted: Wanted, pipeline: str, report: Report
    ) -> None:
        path = await kept.enter_async_context(self._store.obtain(reference, pipeline, report=report))
        loop = asyncio.get_running_loop()
        try:
            entry = await loop.run_in_executor(self._readers, read_fetched, path)
        except UnfitFolder as error:
            raise FailedPrecondition(f"{reference} cannot be used: {error}") from error
        if entry is None or KINDS[type(entry)] != wanted.kind:
            raise FailedPrecondition(f"{reference} is no {wanted.kind} that this service can use")
        # A ControlNet keeps the short name that everybody has for it.
        id_ = entry.id if isinstance(entry, ControlNetEntry) else wanted.name or entry.id
        self._catalogue.add(replace(entry, id=id_, reference=reference), is_newer=True)


def _pipeline(request: diffusion_pb2.GenerateRequest) -> str:
    """As far as it tells which files are needed: a picture to start from takes the VAE's encoder."""
    if request.HasField("mask"):
        return "inpaint"
    if request.HasField("image"):
        return "img2img"
    return "controlnet" if request.controls else "text2img"


def _wanted(request: diffusion_pb2.GenerateRequest, default_id: str) -> Iterator[Wanted]:
    """The checkpoint first: what else is fetched depends on its family."""
    yield Wanted(name=request.model or default_id, kind="checkpoint", field="model")
    for number, control in enumerate(request.controls):
        yield Wanted(name=control.controlnet, kind="controlnet", field=f"controls[{number}].controlnet")
    for number, lora in enumerate(request.loras):
        yield Wanted(name=lora.model, kind="lora", field=f"loras[{number}].model")
    for tag in read_prompt(request.prompt, "prompt").loras:
        yield Wanted(name=tag.name, kind="lora", field="prompt")
    if request.vae:
        yield Wanted(name=request.vae, kind="vae", field="vae")
    for number, name in enumerate(request.embeddings):
        yield Wanted(name=name, kind="embedding", field=f"embeddings[{number}]")


def _within(error: FanlightError, field: str) -> FanlightError:
    """The store's errors are about its own argument."""
    return type(error)(error.message, field=field, retry_after_s=error.retry_after_s)
