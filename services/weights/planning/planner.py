"""From a reference to a plan: what its source, the catalog, the mirrors and the store know of it, put together."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fanlight.errors import FanlightError
from services.kernel.logs import get_logger
from services.weights.errors import NotHeld
from services.weights.planning.plan import FetchPlan, Holdings, make_plan
from services.weights.planning.resolve import Resolver, is_offline, local_path, with_sha256
from services.weights.planning.selection import Selection
from services.weights.references.catalog import Catalog, packaged_path, packaged_place
from services.weights.references.manifest import Manifest, TensorTable, WeightFile, with_packed, with_tables
from services.weights.references.references import AirRef, HubRef, LocalRef, PackageRef, S3Ref, UrlRef, parse
from services.weights.settings import WeightsSettings
from services.weights.transfer.pacing import DownloadTools

log = get_logger()

# How long a hub's answer stands before it is asked again, and for how many references.
ANSWER_S = 300.0
MAX_ANSWERS = 256
# Who has an older answer does not wait longer for a newer one.
OLDER_S = 10.0
OFFLINE = "FANLIGHT_WEIGHTS_OFFLINE forbids to fetch it"


Address = Callable[[str], Awaitable[str]]


class HeldWeights(Protocol):
    """What the planner asks of a store's index. Blocking."""

    def holdings(self) -> Holdings: ...

    def table(self, file_sha256: str) -> TensorTable | None: ...

    def recall_manifest(self, reference: str) -> Manifest | None: ...

    def recall_source(self, source: str) -> tuple[str, str] | None: ...


class FetchPlanner:
    """`catalog` grows by the mirrors' catalogs, which `read_mirrors` reads at the first plan.

    `size_of` returns the size of a held object, None where it is not held.
    """

    def __init__(
        self,
        settings: WeightsSettings,
        tools: DownloadTools,
        catalog: Catalog,
        *,
        held: HeldWeights,
        size_of: Callable[[str], int | None],
        read_mirrors: Callable[[Address], Awaitable[Catalog]],
    ) -> None:
        self.catalog = catalog
        self.resolver = Resolver(tools=tools, catalog=catalog, settings=settings)
        self._settings = settings
        self._tools = tools
        self._held = held
        self._size_of = size_of
        self._read_mirrors = read_mirrors
        # What hubs answered lately, and when.
        self._answers: dict[str, tuple[float, Manifest]] = {}
        self._asking = asyncio.Lock()
        self._knows_mirrors = not settings.mirrors

    async def plan(self, text: str, wish: Selection, sha256: str = "") -> FetchPlan:
        """What fetching it comes to now."""
        await self._ask_mirrors()
        manifest = await self._manifest(text)
        if sha256:
            manifest = with_sha256(manifest, sha256)
        return await self._tools.run(self._make_plan, text, manifest, wish)

    async def _ask_mirrors(self) -> None:
        """Once: know what mirrors have."""
        async with self._asking:
            if self._knows_mirrors:
                return
            found = await self._read_mirrors(self.resolver.address)
            self.catalog = found.under(self.catalog)
            self.resolver.add(found)
            self._knows_mirrors = True

    async def _manifest(self, text: str) -> Manifest:
        if self._settings.offline and not self.resolver.is_known(text):
            return await self._held_manifest(text)
        known = self._answers.get(text)
        if known and self._tools.now_s() - known[0] < ANSWER_S:
            return known[1]
        if self.resolver.is_known(text):
            return await self.resolver.manifest(text)
        held = await self._tools.run(self._held.recall_manifest, text)
        try:
            async with asyncio.timeout(OLDER_S if held else None):
                return self._remembered(text, await self.resolver.manifest(text))
        except (FanlightError, TimeoutError) as error:
            if held is None or not (isinstance(error, TimeoutError) or is_offline(error)):
                raise
            # A query may hold a signature.
            log.warning("weights_source_offline", reference=text.split("?")[0])
            return self._remembered(text, held)

    def _remembered(self, text: str, manifest: Manifest) -> Manifest:
        """A worker that paints one picture after the other does not ask the hub for each."""
        if isinstance(parse(text), HubRef | AirRef):
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            self._answers[text] = (self._tools.now_s(), manifest)
        return manifest

    async def _held_manifest(self, text: str) -> Manifest:
        held = await self._tools.run(self._held.recall_manifest, text)
        if held is None:
            raise NotHeld(f"{text.split('?')[0]} was never fetched here, and {OFFLINE}", field="reference")
        return held

    def _make_plan(self, text: str, manifest: Manifest, wish: Selection) -> FetchPlan:
        manifest = replace(manifest, files=tuple(self._recalled(manifest, f) for f in manifest.files))
        known = self.catalog.tables
        shas = [f.sha256 for f in manifest.files if f.sha256]
        tables = {sha: table for sha in shas if (table := known.get(sha) or self._held.table(sha))}
        manifest = with_packed(with_tables(manifest, tables), self.catalog.packed)
        plan = make_plan(manifest, wish, self._held.holdings())
        if local_path_of(text, manifest):
            return replace(plan, files=tuple(replace(f, held_bytes=f.size_bytes) for f in plan.files))
        return plan

    def _recalled(self, manifest: Manifest, file: WeightFile) -> WeightFile:
        """The file with the digest that it had when it was fetched before, if it is still the same there."""
        if file.sha256 or not file.sources:
            return file
        known = next((k for source in file.sources if (k := self._held.recall_source(source))), None)
        if known is None:
            return file
        sha256, etag = known
        is_mutable = isinstance(parse(file.sources[0]), UrlRef | S3Ref)
        if is_mutable and not (etag and etag == (file.version or manifest.revision)):
            return file
        size_bytes = self._size_of(sha256)
        return replace(file, sha256=sha256, size_bytes=file.size_bytes if size_bytes is None else size_bytes)


def local_path_of(text: str, manifest: Manifest) -> Path | None:
    """Where a model lies that is used in place; None for one that the store keeps."""
    match parse(text):
        case LocalRef(path=path):
            return local_path(path)
        case PackageRef(path=path):
            return packaged_path(path)
    return packaged_place(manifest)


def require_held(text: str, plan: FetchPlan) -> None:
    """NotHeld, naming the first file that is missing and where it could be had."""
    missing = next((item for item in plan.files if item.fetch_bytes), None)
    if missing is not None:
        source = missing.file.sources[0].split("?")[0] if missing.file.sources else "nowhere"
        raise NotHeld(
            f"{text.split('?')[0]}: {missing.file.path} is not held, {OFFLINE}; it comes from {source}",
            field="reference",
        )
