"""What workers announced that they can do: kept once for all who announce the same, under a digest of the content.

The digest is the gateway's own, of what it keeps, so that no worker can put other capabilities in the place of
another's; what a worker calls its capabilities is only good for that worker.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.records import Codec
from services.gateway.jobs.catalog import Catalog, Rank, needs_by_id
from services.gateway.jobs.workers import Annotator, Capabilities
from services.gateway.ordering.tasks import Amounts, can_do, limit_of
from services.gateway.ports import Clock, JobStore

BUCKET = "capabilities"
PAGE = 20
# What no known worker announces is kept so much longer: its worker may be known to another gateway first.
UNUSED_S = 3_600.0
# How often it is made sure that what is used is kept, which another gateway may just have given up.
CHECK_INTERVAL_S = 600.0
# How many nodes a refusal names.
NODES_LIMIT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCapabilities:
    capabilities: Capabilities
    # When they were announced first.
    time_s: float


CAPABILITIES: Codec[KeptCapabilities] = Codec(KeptCapabilities)
_CONTENT: Codec[Capabilities] = Codec(Capabilities)


def digest_of(capabilities: Capabilities) -> str:
    """Hexadecimal sha256 of what is kept of them."""
    return hashlib.sha256(_CONTENT.encode(capabilities)).hexdigest()


@dataclass(slots=True, eq=False)
class Group:
    """The known workers that announced the same."""

    digest: str
    kept: KeptCapabilities
    offers: frozenset[str]
    limits: Amounts
    needs_by_id: Mapping[str, tuple[str, ...]]
    annotators: Mapping[str, Annotator]
    # Bytes by model. Those of several families may share an id, and tasks do not say which: the largest counts.
    sizes: Mapping[str, int]
    # Worker id to node; and those of them that live.
    workers: dict[str, str] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    # Since when no known worker has announced it.
    unused_since_s: float = 0.0
    # When the store was seen to have it; 0 for never.
    checked_s: float = 0.0

    @property
    def capabilities(self) -> Capabilities:
        return self.kept.capabilities

    @property
    def rank(self) -> Rank:
        return not self.live, -self.kept.time_s, self.digest


def _group(digest: str, kept: KeptCapabilities, now_s: float) -> Group:
    capabilities = kept.capabilities
    sizes: dict[str, int] = {}
    for model in capabilities.models:
        sizes[model.id] = max(sizes.get(model.id, 0), model.size_bytes)
    return Group(
        digest=digest,
        kept=kept,
        offers=capabilities.offers,
        limits=capabilities.all_limits,
        needs_by_id=needs_by_id(capabilities),
        annotators={each.id: each for each in reversed(capabilities.annotators)},
        sizes=sizes,
        unused_since_s=now_s,
    )


class Groups:
    """By digest, with what they offer together. Asking looks at groups, never at workers."""

    def __init__(self, store: JobStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.catalog = Catalog()
        self._known: dict[str, Group] = {}
        # By need, of groups that have workers.
        self._offering: dict[str, list[Group]] = {}

    # Kept

    async def load(self) -> None:
        page = await self._store.list(BUCKET, limit=PAGE)
        while page:
            for record in page:
                if kept := CAPABILITIES.read(BUCKET, record):
                    self._remember(record.key, kept).checked_s = self._clock.monotonic_s()
            page = await self._store.list(BUCKET, before=page[-1].key, limit=PAGE)

    def _remember(self, digest: str, kept: KeptCapabilities) -> Group:
        if digest not in self._known:
            self._known[digest] = _group(digest, kept, self._clock.now_s())
        return self._known[digest]

    def find(self, digest: str) -> Group | None:
        return self._known.get(digest)

    async def get(self, digest: str) -> Group | None:
        """From the store where this process does not know it."""
        known = self._known.get(digest)
        if known is not None:
            return known
        record = await self._store.get(BUCKET, digest)
        kept = CAPABILITIES.read(BUCKET, record) if record else None
        return self._remember(digest, kept) if kept else None

    async def keep(self, capabilities: Capabilities) -> Group:
        """Those that a worker announces; durable on return."""
        digest = digest_of(capabilities)
        group = await self.get(digest)
        if group is None:
            group = self._remember(digest, KeptCapabilities(capabilities=capabilities, time_s=self._clock.now_s()))
        await self.make_sure(group)
        return group

    async def make_sure(self, group: Group) -> None:
        """That the store has it, now and then; always before its first worker refers to it."""
        now_s = self._clock.monotonic_s()
        if group.workers and group.checked_s and now_s - group.checked_s < CHECK_INTERVAL_S:
            return
        record, value = await self._store.get(BUCKET, group.digest), CAPABILITIES.encode(group.kept)
        with contextlib.suppress(AlreadyExists, Conflict):
            if record is None:
                await self._store.create(BUCKET, group.digest, value)
            elif CAPABILITIES.read(BUCKET, record) is None:
                await self._store.put(BUCKET, group.digest, value, revision=record.revision)
        group.checked_s = now_s

    async def sweep(self) -> None:
        """Forget what no known worker has announced for a while."""
        until_s = self._clock.now_s() - UNUSED_S
        for group in [each for each in self._known.values() if not each.workers and each.unused_since_s <= until_s]:
            del self._known[group.digest]
            await self._store.delete(BUCKET, group.digest)

    # Who announced them

    def join(self, group: Group, worker_id: str, node: str) -> Group:
        """One that is away until it is said to live. The group that it is in: the first of two of the same digest."""
        group = self._known.setdefault(group.digest, group)
        if not group.workers:
            self.catalog.change(group.capabilities, before=None, after=group.rank)
            for need in group.offers:
                self._offering.setdefault(need, []).append(group)
        group.workers[worker_id] = node
        return group

    def leave(self, group: Group, worker_id: str) -> None:
        self.set_live(group, worker_id, live=False)
        del group.workers[worker_id]
        if not group.workers:
            self.catalog.change(group.capabilities, before=group.rank, after=None)
            group.unused_since_s = self._clock.now_s()
            for need in group.offers:
                groups = self._offering[need]
                groups.remove(group)
                if not groups:
                    del self._offering[need]

    def set_live(self, group: Group, worker_id: str, *, live: bool) -> None:
        before = group.rank
        if live:
            group.live.add(worker_id)
        else:
            group.live.discard(worker_id)
        if group.rank != before:
            self.catalog.change(group.capabilities, before=before, after=group.rank)

    # What they can do

    def can_any(self, needs: frozenset[str], amounts: Amounts, *, only_live: bool) -> bool:
        return any(
            (group.live or not only_live) and can_do(group.offers, group.limits, needs, amounts)
            for group in self._nearest(needs)
        )

    def _nearest(self, needs: frozenset[str]) -> list[Group]:
        """Those that offer the need that the fewest do; without needs all that have workers."""
        if not needs:
            return [group for group in self._known.values() if group.workers]
        return min((self._offering.get(need, []) for need in needs), key=len)

    def offering(self, need: str) -> list[str]:
        """Up to five nodes whose workers offer it, live ones first."""
        groups = self._offering.get(need, [])
        nodes: dict[str, None] = {}
        for live in (True, False):
            for group in groups:
                for node in _nodes(group, live=live):
                    nodes[node] = None
                    if len(nodes) == NODES_LIMIT:
                        return list(nodes)
        return list(nodes)

    def limits_of(self, name: str, needs: frozenset[str]) -> list[tuple[str, int | None]]:
        """Up to five nodes whose workers offer the needs, and what they take, the largest first; None for no bound."""
        able = [(limit_of(group.limits, name), group) for group in self._nearest(needs) if needs <= group.offers]
        able.sort(key=lambda each: (each[0] is not None, -(each[0] or 0), not each[1].live))
        nodes: dict[str, int | None] = {}
        for limit, group in able:
            for live in (True, False):
                for node in _nodes(group, live=live):
                    nodes.setdefault(node, limit)
                    if len(nodes) == NODES_LIMIT:
                        return list(nodes.items())
        return list(nodes.items())

    def with_annotator(self, annotator_id: str) -> list[Group]:
        """Those that offer it, live ones first, in the catalog's order."""
        return sorted(self._offering.get(f"annotator:{annotator_id}", []), key=lambda group: group.rank)


def _nodes(group: Group, *, live: bool) -> Iterator[str]:
    return (node for worker, node in group.workers.items() if (worker in group.live) == live)
