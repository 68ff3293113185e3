"""From a reference to a plan: combines its source, the catalog, the mirrors and what the store has.

Knows the store and the mirrors only through what it is given.
"""

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

# How long a hub's manifest is cached before it is requested again, and for how many references.
MANIFEST_TTL_S = 300.0
MAX_RECENT = 256
# With an older manifest in the store, wait no longer than this for a newer one.
STALE_WAIT_S = 10.0
OFFLINE = "FANLIGHT_WEIGHTS_OFFLINE forbids fetching it"

Address = Callable[[str], Awaitable[str]]


class HeldWeights(Protocol):
    """What the planner asks of a store's index. Blocking."""

    def holdings(self) -> Holdings: ...

    def table(self, file_sha256: str) -> TensorTable | None: ...

    def recall_manifest(self, reference: str) -> Manifest | None: ...

    def recall_source(self, source: str) -> tuple[str, str] | None: ...


class FetchPlanner:
    """Mirrors' catalogs, read by `read_mirrors` before the first plan, are added to `catalog`.

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
        # Manifests that hubs returned recently, and when.
        self._recent: dict[str, tuple[float, Manifest]] = {}
        self._mirrors_lock = asyncio.Lock()
        self._has_mirrors = not settings.mirrors

    async def plan(self, reference: str, selection: Selection, sha256: str = "") -> FetchPlan:
        """What fetching the reference would download now."""
        await self._load_mirrors()
        manifest = await self._manifest(reference)
        if sha256:
            manifest = with_sha256(manifest, sha256)
        return await self._tools.run(self._make_plan, reference, manifest, selection)

    async def _load_mirrors(self) -> None:
        """Read the mirrors' catalogs, once."""
        async with self._mirrors_lock:
            if self._has_mirrors:
                return
            found = await self._read_mirrors(self.resolver.address)
            self.catalog = found.under(self.catalog)
            self.resolver.add(found)
            self._has_mirrors = True

    async def _manifest(self, reference: str) -> Manifest:
        if self._settings.offline and not self.resolver.is_known(reference):
            return await self._stored_manifest(reference)
        known = self._recent.get(reference)
        if known and self._tools.now_s() - known[0] < MANIFEST_TTL_S:
            return known[1]
        if self.resolver.is_known(reference):
            return await self.resolver.manifest(reference)
        held = await self._tools.run(self._held.recall_manifest, reference)
        try:
            async with asyncio.timeout(STALE_WAIT_S if held else None):
                return self._cached(reference, await self.resolver.manifest(reference))
        except (FanlightError, TimeoutError) as error:
            if held is None or not (isinstance(error, TimeoutError) or is_offline(error)):
                raise
            # A query may contain a signature.
            log.warning("weights_source_offline", reference=reference.split("?")[0])
            return self._cached(reference, held)

    def _cached(self, reference: str, manifest: Manifest) -> Manifest:
        """Cache the manifest, so that a worker does not query the hub for every image."""
        if isinstance(parse(reference), HubRef | AirRef):
            if len(self._recent) >= MAX_RECENT:
                self._recent.clear()
            self._recent[reference] = (self._tools.now_s(), manifest)
        return manifest

    async def _stored_manifest(self, reference: str) -> Manifest:
        held = await self._tools.run(self._held.recall_manifest, reference)
        if held is None:
            raise NotHeld(f"{reference.split('?')[0]} was never fetched here, and {OFFLINE}", field="reference")
        return held

    def _make_plan(self, reference: str, manifest: Manifest, selection: Selection) -> FetchPlan:
        manifest = replace(manifest, files=tuple(self._with_known_digest(manifest, f) for f in manifest.files))
        known = self.catalog.tables
        shas = [f.sha256 for f in manifest.files if f.sha256]
        tables = {sha: table for sha in shas if (table := known.get(sha) or self._held.table(sha))}
        manifest = with_packed(with_tables(manifest, tables), self.catalog.packed)
        plan = make_plan(manifest, selection, self._held.holdings())
        if local_path_of(reference, manifest):
            return replace(plan, files=tuple(replace(f, held_bytes=f.size_bytes) for f in plan.files))
        return plan

    def _with_known_digest(self, manifest: Manifest, file: WeightFile) -> WeightFile:
        """The file with its digest from an earlier fetch, if the source still has the same version."""
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


def local_path_of(reference: str, manifest: Manifest) -> Path | None:
    """The path of a model that is used in place (local or packaged); None for models kept in the store."""
    match parse(reference):
        case LocalRef(path=path):
            return local_path(path)
        case PackageRef(path=path):
            return packaged_path(path)
    return packaged_place(manifest)


def require_held(reference: str, plan: FetchPlan) -> None:
    """NotHeld with the first missing file and its source, unless everything is held."""
    missing = next((item for item in plan.files if item.fetch_bytes), None)
    if missing is not None:
        source = missing.file.sources[0].split("?")[0] if missing.file.sources else "nowhere"
        raise NotHeld(
            f"{reference.split('?')[0]}: {missing.file.path} is not in the store, {OFFLINE}; it comes from {source}",
            field="reference",
        )
