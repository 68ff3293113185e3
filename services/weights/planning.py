"""From a reference to a plan: what its source, the catalog, the mirrors and the store know of it, put together."""

import asyncio
from dataclasses import replace
from pathlib import Path

from fanlight.errors import FanlightError
from services.kernel.logs import get_logger
from services.weights import packaged
from services.weights.catalog import Catalog
from services.weights.errors import NotHeld
from services.weights.manifest import Manifest, WeightFile, with_packed, with_tables
from services.weights.mirrors import mirrored
from services.weights.objects import Objects
from services.weights.plan import Plan, make_plan
from services.weights.references import AirRef, HubRef, LocalRef, PackageRef, S3Ref, UrlRef, parse
from services.weights.resolve import Resolver, is_offline, local_path, with_sha256
from services.weights.selection import Wish
from services.weights.settings import WeightsSettings
from services.weights.targets import Tools

log = get_logger()

# How long a hub's answer stands before it is asked again, and for how many references.
ANSWER_S = 300.0
MAX_ANSWERS = 256
# Who has an older answer does not wait longer for a newer one.
OLDER_S = 10.0
OFFLINE = "FANLIGHT_WEIGHTS_OFFLINE forbids to fetch it"


class Planner:
    """`catalog` grows by what the mirrors have once something is planned."""

    def __init__(self, settings: WeightsSettings, objects: Objects, tools: Tools, catalog: Catalog) -> None:
        self.catalog = catalog
        self.resolver = Resolver(tools=tools, catalog=catalog, settings=settings)
        self._settings = settings
        self._objects = objects
        self._tools = tools
        # What hubs answered lately, and when.
        self._answers: dict[str, tuple[float, Manifest]] = {}
        self._asking = asyncio.Lock()
        self._knows_mirrors = not settings.mirrors

    async def plan(self, text: str, wish: Wish, sha256: str = "") -> Plan:
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
            found = await mirrored(
                self._settings.mirror_bases(),
                web=self._tools.web,
                address=self.resolver.address,
                cache=self._objects.folder,
                is_offline=self._settings.offline,
            )
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
        held = await self._tools.run(self._objects.index.recall_manifest, text)
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
        held = await self._tools.run(self._objects.index.recall_manifest, text)
        if held is None:
            raise NotHeld(f"{text.split('?')[0]} was never fetched here, and {OFFLINE}", field="reference")
        return held

    def _make_plan(self, text: str, manifest: Manifest, wish: Wish) -> Plan:
        index = self._objects.index
        manifest = replace(manifest, files=tuple(self._recalled(manifest, f) for f in manifest.files))
        known = self.catalog.tables
        shas = [f.sha256 for f in manifest.files if f.sha256]
        tables = {sha: table for sha in shas if (table := known.get(sha) or index.table(sha))}
        manifest = with_packed(with_tables(manifest, tables), self.catalog.packed)
        plan = make_plan(manifest, wish, index.holdings())
        if lies(text, manifest):
            return replace(plan, files=tuple(replace(f, held_bytes=f.size_bytes) for f in plan.files))
        return plan

    def _recalled(self, manifest: Manifest, file: WeightFile) -> WeightFile:
        """The file with the digest that it had when it was fetched before, if it is still the same there."""
        if file.sha256 or not file.sources:
            return file
        known = next((k for source in file.sources if (k := self._objects.index.recall_source(source))), None)
        if known is None:
            return file
        sha256, etag = known
        is_mutable = isinstance(parse(file.sources[0]), UrlRef | S3Ref)
        if is_mutable and not (etag and etag == (file.version or manifest.revision)):
            return file
        size = self._objects.path_of(sha256)
        is_held = size.exists()
        return replace(file, sha256=sha256, size_bytes=size.stat().st_size if is_held else file.size_bytes)


def lies(text: str, manifest: Manifest) -> Path | None:
    """Where a model lies that is used in place; None for one that the store keeps."""
    match parse(text):
        case LocalRef(path=path):
            return local_path(path)
        case PackageRef(path=path):
            return packaged.path_of(path)
    return packaged.place_of(manifest)


def require_held(text: str, plan: Plan) -> None:
    """NotHeld, naming the first file that is missing and where it could be had."""
    missing = next((item for item in plan.files if item.fetch_bytes), None)
    if missing is not None:
        source = missing.file.sources[0].split("?")[0] if missing.file.sources else "nowhere"
        raise NotHeld(
            f"{text.split('?')[0]}: {missing.file.path} is not held, {OFFLINE}; it comes from {source}",
            field="reference",
        )
