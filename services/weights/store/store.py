"""The weight store: references in, paths to load from out. The entry for workers and the command line."""

import asyncio
import contextlib
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanlight.errors import Conflict, FanlightError
from services.kernel.logs import get_logger
from services.weights.errors import disk_errors
from services.weights.mirror.mirrors import read_mirrors
from services.weights.planning.plan import FetchPlan, PlannedFile
from services.weights.planning.planner import FetchPlanner, local_path_of, require_held
from services.weights.planning.selection import PICKLES, VAE_DECODER, Selection, is_single_file, part_of_vae
from services.weights.references.catalog import Catalog, shipped, with_folder
from services.weights.references.manifest import Manifest
from services.weights.settings import WeightsLimits, WeightsSettings
from services.weights.store.fetching import FileFetcher, PlacedFile
from services.weights.store.index import HeldModel, held_models
from services.weights.store.objects import Objects
from services.weights.transfer.download import DownloadProgress, ProgressTally
from services.weights.transfer.pacing import DownloadLimits, DownloadTools, Pacer, Traffic
from services.weights.transfer.web import Web

log = get_logger()

A1111_FOLDER = "a1111"
CHECKPOINTS, LORAS, VAES, CONTROLNETS = (f"models/{name}" for name in ("Stable-diffusion", "Lora", "VAE", "ControlNet"))
EMBEDDINGS = "embeddings"
_FOLDER_OF_KIND = {
    "checkpoint": CHECKPOINTS,
    "lora": LORAS,
    "locon": LORAS,
    "lycoris": LORAS,
    "dora": LORAS,
    "vae": VAES,
    "controlnet": CONTROLNETS,
    "textualinversion": EMBEDDINGS,
    "embedding": EMBEDDINGS,
}

_LORA_MARKS = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".hada_w1_a", ".lokr_w1")
_CONTROL_MARKS = ("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks.")
_EMBEDDING_NAMES = frozenset({"emb_params", "clip_l", "clip_g", "string_to_param"})
# Names that diffusers gives to every model; the view's name says more.
_PLAIN_STEMS = frozenset({"diffusion_pytorch_model", "model", "pytorch_lora_weights", "learned_embeds"})

IO_THREADS = 4
# Files of one model fetched at the same time; each has several connections of its own.
FILES_AT_ONCE = 3
MAX_PLANS = 3
ANNOTATOR = "annotator"


def a1111_path(kind: str, view: str, link: str, tensors: Sequence[str]) -> str:
    """The path, below A1111_FOLDER, where the A1111 web UI looks for a model of one file; empty if there is none."""
    folder = _a1111_folder(kind, tensors)
    stem, _, ending = link.rpartition("/")[2].rpartition(".")
    name = view.rpartition("/")[2] if stem in _PLAIN_STEMS else stem
    return f"{folder}/{name}.{ending}" if folder else ""


def _a1111_folder(kind: str, tensors: Iterable[str]) -> str:
    """By the tensor names, or by the source's kind if the names do not show it."""
    names = set(tensors)
    if is_single_file(names):
        return CHECKPOINTS
    if any(mark in name for name in names for mark in _LORA_MARKS):
        return LORAS
    if any(name.startswith(_CONTROL_MARKS) for name in names):
        return CONTROLNETS
    if names and names <= _EMBEDDING_NAMES:
        return EMBEDDINGS
    if VAE_DECODER in {part_of_vae(name) for name in names}:
        return VAES
    return _FOLDER_OF_KIND.get(kind, "") if not names or kind != "checkpoint" else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """`path` is the view's folder, or the file if the reference is a single file (never for annotators)."""

    reference: str
    path: Path
    size_bytes: int
    downloaded_bytes: int
    objects: tuple[str, ...] = ()


class WeightStore:
    """Open with `async with WeightStore.open(settings) as store`. Several processes may share one folder."""

    def __init__(self, settings: WeightsSettings, objects: Objects, tools: DownloadTools, catalog: Catalog) -> None:
        self.objects = objects
        self._settings = settings
        self._tools = tools
        self._planner = FetchPlanner(
            settings,
            tools,
            catalog,
            held=objects.index,
            size_of=objects.size_of,
            read_mirrors=lambda address: read_mirrors(
                settings.mirror_bases(),
                web=tools.web,
                address=address,
                cache=objects.folder,
                is_offline=settings.offline,
            ),
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        settings: WeightsSettings,
        *,
        limits: WeightsLimits | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> AsyncIterator["WeightStore"]:
        limits = limits or WeightsLimits()
        catalog = with_folder(shipped(), settings.catalog_dir) if settings.catalog_dir else shipped()
        web = Web(
            settings.tokens(),
            stall_s=limits.stall_s,
            connections=settings.connections,
            wall_s=wall_s,
            allows=settings.allows,
        )
        with ThreadPoolExecutor(IO_THREADS, thread_name_prefix="weights-io") as io:
            objects = await asyncio.get_running_loop().run_in_executor(
                io, lambda: Objects(settings.dir, budget_bytes=settings.budget_bytes, now_s=wall_s)
            )
            traffic = Traffic(objects.index.add_traffic, io, settings.daily_bytes, wall_s)
            tools = DownloadTools(
                web=web,
                io=io,
                pacer=Pacer(settings.bandwidth_bps, time.monotonic, objects.folder / "bandwidth"),
                limits=DownloadLimits(
                    connections=settings.connections,
                    piece_bytes=settings.piece_bytes,
                    slow_bps=settings.slow_bps,
                    retries=settings.retries,
                ),
                parts=objects.parts,
                reserve=objects.reserve,
                count=traffic.count,
                wall_s=wall_s,
                chance=random.Random(),
            )
            try:
                yield cls(settings, objects, tools, catalog)
            finally:
                await _flush_traffic(traffic)
                await web.close()

    @property
    def catalog(self) -> Catalog:
        return self._planner.catalog

    def selection(self, pipeline: str = "", *, safety_checker: bool = False, precision: str = "fp16") -> Selection:
        return Selection(
            pipeline=pipeline,
            safety_checker=safety_checker,
            precision=precision,
            allow_pickle=self._settings.allow_pickle,
            pinned_pickles=self.catalog.pinned_pickles(),
        )

    async def plan(self, references: Sequence[str], selection: Selection, *, sha256: str = "") -> list[FetchPlan]:
        """Plan what fetching these references and profiles would download, and why. Nothing is downloaded."""
        names = self.catalog.expand(references)
        return [await self._planner.plan(name, selection, sha256 if len(names) == 1 else "") for name in names]

    async def ensure(
        self, reference: str, pipeline: str = "", *, report: Callable[[DownloadProgress], None] = lambda progress: None
    ) -> Path:
        """The path to load the reference from, for this pipeline; fetched first if it is not held."""
        return (await self.fetch(reference, self.selection(pipeline), report=report)).path

    @contextlib.asynccontextmanager
    async def acquire(
        self, reference: str, pipeline: str = "", *, report: Callable[[DownloadProgress], None] = lambda progress: None
    ) -> AsyncIterator[Path]:
        """As `ensure`, protected from eviction while this is open."""
        for _ in range(MAX_PLANS):
            fetched = await self.fetch(reference, self.selection(pipeline), report=report)
            with self.objects.using(fetched.objects) as is_whole:
                if is_whole:
                    yield fetched.path
                    return
        raise Conflict(f"{reference} was evicted {MAX_PLANS} times, right after each fetch")

    async def fetch(
        self,
        reference: str,
        selection: Selection,
        *,
        sha256: str = "",
        report: Callable[[DownloadProgress], None] = lambda progress: None,
    ) -> Fetched:
        """As `ensure`, and returns what was downloaded."""
        for _ in range(MAX_PLANS):
            plan = await self._planner.plan(reference, selection, sha256)
            if place := local_path_of(reference, plan.manifest):
                return Fetched(reference=reference, path=place, size_bytes=plan.held_bytes, downloaded_bytes=0)
            if self._settings.offline:
                require_held(reference, plan)
            with contextlib.suppress(Conflict):
                return await self._carry_out(reference, plan, selection, report)
        raise Conflict(f"{reference}: objects were evicted {MAX_PLANS} times during the fetch")

    async def _carry_out(
        self, reference: str, plan: FetchPlan, selection: Selection, report: Callable[[DownloadProgress], None]
    ) -> Fetched:
        tally = ProgressTally(reference=reference, fetch_bytes=plan.fetch_bytes, report=report)
        fetching = FileFetcher(
            objects=self.objects, tools=self._tools, resolver=self._planner.resolver, report=tally.update
        )
        gate = asyncio.Semaphore(FILES_AT_ONCE)
        with contextlib.ExitStack() as in_use:

            async def place(item: PlannedFile) -> PlacedFile:
                async with gate:
                    placed = await fetching.fetch(plan, item, selection)
                # From now on, this file is not evicted to make space for the plan's other files.
                if not in_use.enter_context(self.objects.using(sha for _, sha in placed.links)):
                    raise Conflict(f"{item.file.path} was evicted right after its fetch")
                return placed

            held = [item.file.sha256 for item in plan.files if item.tensors is None and not item.fetch_bytes]
            in_use.enter_context(self.objects.using(await self._tools.run(self._names, held)))
            placed = await _all_or_first_error(place(item) for item in plan.files)
            links = [link for p in placed for link in p.links]
            with disk_errors(reference):
                path = await self._tools.run(self._link, reference, plan, links)
            size_bytes = await self._tools.run(self.objects.bytes_of, [sha for _, sha in links])
        return Fetched(
            reference=reference,
            path=path,
            size_bytes=size_bytes,
            downloaded_bytes=sum(p.downloaded_bytes for p in placed),
            objects=tuple(sha for _, sha in links),
        )

    def _names(self, shas: Iterable[str]) -> list[str]:
        return [found for sha in shas if (found := self.objects.index.find(sha))]

    def _link(self, reference: str, plan: FetchPlan, links: list[tuple[str, str]]) -> Path:
        folder = self.objects.link(plan.manifest.view, links)
        self.objects.index.remember_manifest(reference, plan.manifest)
        self._link_for_a1111(plan.manifest, links)
        first = folder / links[0][0]
        # Annotators are loaded from their folder, however many files they have.
        if plan.manifest.kind == ANNOTATOR:
            return folder
        if plan.manifest.is_chosen and len(links) == 1:
            return first
        # The parts of one checkpoint have a folder of their own.
        is_one_checkpoint = plan.manifest.is_chosen and len({item.file.path for item in plan.files}) == 1
        return first.parent if is_one_checkpoint else folder

    def _link_for_a1111(self, manifest: Manifest, links: list[tuple[str, str]]) -> None:
        """Link a model of one file where the A1111 web UI looks for it, too."""
        models = [(link, sha) for link, sha in links if link.endswith((".safetensors", *PICKLES))]
        if len(models) != 1 or manifest.kind == ANNOTATOR:
            return
        (link, sha), table = models[0], self.objects.index.table(models[0][1])
        place = a1111_path(manifest.kind, manifest.view, link, [t.name for t in table.tensors] if table else ())
        if place:
            self.objects.link_alias(f"{A1111_FOLDER}/{place}", manifest.view, sha)

    @property
    def link_bps(self) -> float:
        """Measured goodput of the link, in bits per second; 0 until something large was fetched."""
        return self._tools.link.bps

    async def inventory(self) -> list[HeldModel]:
        """Every view with all its files."""
        return await self._tools.run(held_models, self.objects.index)

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run blocking work on the objects, off the event loop."""
        return await self._tools.run(work, *args)


async def _flush_traffic(traffic: Traffic) -> None:
    """On a full disk the count is lost, rather than the error that reports the full disk."""
    try:
        await traffic.flush()
    except sqlite3.Error as error:
        log.warning("weights_traffic_lost", why=str(error))


async def _all_or_first_error(works: Iterable[Coroutine[Any, Any, PlacedFile]]) -> list[PlacedFile]:
    """All results, or the first error after the others were cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise _first_error(errors) from errors
    return [task.result() for task in tasks]


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of our own errors; the whole group if there is none."""
    ours, _ = group.split(FanlightError)
    error: BaseException = ours or group
    while ours and isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
