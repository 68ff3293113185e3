"""What workers announced that they can do, and the speeds of theirs that the scheduler may believe.

Capabilities are stored once for all workers that announce the same, under a digest that the gateway computes itself: no
worker can replace another's, and the digest that a worker sends is only used for that worker.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from fanlight.contract.limits import size_class
from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.records import Codec, Records
from services.gateway.domain.fleet_catalog import FleetCatalog, Rank, needs_by_id
from services.gateway.domain.job import Facts
from services.gateway.domain.offers import LeftOut, OfferRules
from services.gateway.domain.workers import (
    AnnouncedAnnotator,
    AnnouncedLeftOut,
    Capabilities,
    LeftOutOfFleet,
    ReportedStepTime,
    Worker,
)
from services.gateway.ports import Clock
from services.gateway.scheduler.pace import Delivered, RecentMean, StepTimes, delivered_times, plausible
from services.gateway.scheduler.queue import Amounts, can_do, limit_of
from services.gateway.scheduler.workers import WorkerView
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "capabilities"
PAGE = 20
# Capabilities without a known worker are deleted after so long: another gateway may know their worker first.
UNUSED_S = 3_600.0
# How often a used record is checked: another gateway may have deleted it.
CHECK_INTERVAL_S = 600.0
# Of what workers announce and get no tasks for, in one line of the log.
LEFT_OUT_SHOWN = 5
# How many nodes a refusal names.
NODES_LIMIT = 5
# How much of what all workers do not use is listed.
LEFT_OUT_LISTED = 1_000
# Where no link was measured yet: what most homes have.
USUAL_LINK_BPS = 50e6
# What a task takes besides its steps, or altogether in a stage without steps.
TASK_S = 0.5
# No home link and no card is faster than these bounds, and slower ones are useless.
LINK_MAX_BPS, LINK_MIN_BPS = 10e9, 0.1e6
STEP_MIN_S, STEP_MAX_S = 1e-3, 600.0
# How many times what its fetches got a worker's link may have.
LINK_OFF = 2.0
# Of how many families and sizes a worker's times are measured.
DELIVERED_CLASSES_LIMIT = 64
# For how many devices averages are kept, and for how many families and sizes of each.
DEVICES_LIMIT = 1_000
CLASSES_LIMIT = 256
# A new average goes to the scheduler once it has moved by more than this part.
USUAL_MOVED = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCapabilities:
    capabilities: Capabilities
    # When they were first announced.
    time_s: float


CAPABILITIES: Codec[KeptCapabilities] = Codec(KeptCapabilities)
_CONTENT: Codec[Capabilities] = Codec(Capabilities)


def digest_of(capabilities: Capabilities) -> str:
    """Hexadecimal sha256 of their stored form."""
    return hashlib.sha256(_CONTENT.encode(capabilities)).hexdigest()


@dataclass(frozen=True, slots=True)
class Member:
    """Where a worker of a group is, and what it does."""

    node: str
    stage: str


@dataclass(slots=True, eq=False)
class CapabilityGroup:
    """The known workers that announced the same."""

    digest: str
    kept: KeptCapabilities
    # What counts of what they announced, and what does not.
    offered: Capabilities
    left_out: tuple[LeftOut, ...]
    offers: frozenset[str]
    limits: Amounts
    needs_by_id: Mapping[str, tuple[str, ...]]
    annotators: Mapping[str, AnnouncedAnnotator]
    # Bytes by model id. Models of several families may share an id, and tasks do not say which: the largest counts.
    sizes: Mapping[str, int]
    # By worker id; then the ids of the live ones, and how many of either each stage has.
    workers: dict[str, Member] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    of_stage: Counter[str] = field(default_factory=Counter)
    live_of_stage: Counter[str] = field(default_factory=Counter)
    # Workers that announced it and are not counted on; the record is kept for them.
    left: set[str] = field(default_factory=set)
    # Since when the group has no worker.
    unused_since_s: float = 0.0
    # When the store was last seen to have it; 0 for never.
    checked_s: float = 0.0

    @property
    def capabilities(self) -> Capabilities:
        """As announced."""
        return self.kept.capabilities

    @property
    def rank(self) -> Rank:
        return not self.live, self.kept.time_s, self.digest


def _group(digest: str, kept: KeptCapabilities, now_s: float, rules: OfferRules) -> CapabilityGroup:
    capabilities, left_out = rules.offered(kept.capabilities)
    sizes: dict[str, int] = {}
    for model in capabilities.models:
        sizes[model.id] = max(sizes.get(model.id, 0), model.size_bytes)
    return CapabilityGroup(
        digest=digest,
        kept=kept,
        offered=capabilities,
        left_out=left_out,
        offers=capabilities.offers,
        limits=capabilities.all_limits,
        needs_by_id=needs_by_id(capabilities),
        annotators={each.id: each for each in reversed(capabilities.annotators)},
        sizes=sizes,
        unused_since_s=now_s,
    )


class CapabilityGroups:
    """By digest, with what they offer together. A lookup costs the same for any number of alike workers."""

    def __init__(self, store: Records, clock: Clock, rules: OfferRules, *, default_model: str = "") -> None:
        """`default_model`: the operator's; empty for none."""
        self._store = store
        self._clock = clock
        self._rules = rules
        self.catalog = FleetCatalog(default_model)
        self._known: dict[str, CapabilityGroup] = {}
        # By need, of groups that have workers.
        self._offering: dict[str, list[CapabilityGroup]] = {}

    # Stored records

    async def load(self) -> None:
        page = await self._store.list(BUCKET, limit=PAGE)
        while page:
            for record in page:
                if kept := self._store.read(CAPABILITIES, BUCKET, record):
                    self._remember(record.key, kept).checked_s = self._clock.monotonic_s()
            page = await self._store.list(BUCKET, before=page[-1].key, limit=PAGE)

    def _remember(self, digest: str, kept: KeptCapabilities) -> CapabilityGroup:
        if digest not in self._known:
            group = self._known[digest] = _group(digest, kept, self._clock.now_s(), self._rules)
            if group.left_out:
                shown = [f"{each.need}: {each.why}" for each in group.left_out[:LEFT_OUT_SHOWN]]
                log.warning("offers_left_out", digest=digest, count=len(group.left_out), offers=shown)
        return self._known[digest]

    def find(self, digest: str) -> CapabilityGroup | None:
        return self._known.get(digest)

    async def get(self, digest: str) -> CapabilityGroup | None:
        """From memory, else from the store."""
        known = self._known.get(digest)
        if known is not None:
            return known
        record = await self._store.get(BUCKET, digest)
        kept = self._store.read(CAPABILITIES, BUCKET, record) if record else None
        return self._remember(digest, kept) if kept else None

    async def keep(self, capabilities: Capabilities) -> CapabilityGroup:
        """Store what a worker announces; durable on return."""
        digest = digest_of(capabilities)
        group = await self.get(digest)
        if group is None:
            group = self._remember(digest, KeptCapabilities(capabilities=capabilities, time_s=self._clock.now_s()))
        await self.ensure_stored(group)
        return group

    async def ensure_stored(self, group: CapabilityGroup) -> None:
        """Restore the record if it is gone. Checked now and then, always before the group's first worker is stored."""
        now_s = self._clock.monotonic_s()
        if (group.workers or group.left) and group.checked_s and now_s - group.checked_s < CHECK_INTERVAL_S:
            return
        record, value = await self._store.get(BUCKET, group.digest), CAPABILITIES.encode(group.kept)
        with contextlib.suppress(AlreadyExists, Conflict):
            if record is None:
                await self._store.create(BUCKET, group.digest, value)
            elif self._store.read(CAPABILITIES, BUCKET, record) is None:
                await self._store.put(BUCKET, group.digest, value, revision=record.revision)
        group.checked_s = now_s

    async def sweep(self) -> None:
        """Delete what no known worker has announced for a while."""
        until_s = self._clock.now_s() - UNUSED_S
        unused = [each for each in self._known.values() if not each.workers and not each.left]
        for group in [each for each in unused if each.unused_since_s <= until_s]:
            del self._known[group.digest]
            await self._store.delete(BUCKET, group.digest)

    # Members

    def join(self, group: CapabilityGroup, worker_id: str, node: str, stage: str) -> CapabilityGroup:
        """Add a worker, not live yet. Returns the group that it is in: the first of two with the same digest."""
        group = self._known.setdefault(group.digest, group)
        if not group.workers:
            self.catalog.change(group.offered, before=None, after=group.rank)
            for need in group.offers:
                self._offering.setdefault(need, []).append(group)
        group.workers[worker_id] = Member(node, stage)
        group.of_stage[stage] += 1
        self.catalog.count_announcing(group.digest, stage, 1)
        return group

    def keep_for(self, group: CapabilityGroup, worker_id: str) -> CapabilityGroup:
        """As `join`, for a worker that is not counted on: it offers nothing."""
        group = self._known.setdefault(group.digest, group)
        group.left.add(worker_id)
        return group

    def leave(self, group: CapabilityGroup, worker_id: str) -> None:
        if worker_id in group.left:
            group.left.remove(worker_id)
            group.unused_since_s = self._clock.now_s()
            return
        self.set_live(group, worker_id, live=False)
        stage = group.workers.pop(worker_id).stage
        group.of_stage[stage] -= 1
        self.catalog.count_announcing(group.digest, stage, -1)
        if not group.workers:
            self.catalog.change(group.offered, before=group.rank, after=None)
            group.unused_since_s = self._clock.now_s()
            for need in group.offers:
                groups = self._offering[need]
                groups.remove(group)
                if not groups:
                    del self._offering[need]

    def set_live(self, group: CapabilityGroup, worker_id: str, *, live: bool) -> None:
        if worker_id in group.left or (worker_id in group.live) == live:
            return
        before = group.rank
        group.live_of_stage[group.workers[worker_id].stage] += 1 if live else -1
        if live:
            group.live.add(worker_id)
        else:
            group.live.remove(worker_id)
        if group.rank != before:
            self.catalog.change(group.offered, before=before, after=group.rank)

    # What they can do

    def can_any(self, stage: str, needs: frozenset[str], amounts: Amounts, *, only_live: bool) -> bool:
        return any(
            (group.live_of_stage if only_live else group.of_stage)[stage]
            and can_do(group.offers, group.limits, needs, amounts)
            for group in self._nearest(needs)
        )

    def has_live(self, stage: str, needs: frozenset[str], but_not: frozenset[str]) -> bool:
        """Whether a live worker of another node than those offers all the needs."""
        return any(
            node not in but_not
            for group in self._nearest(needs)
            if needs <= group.offers
            for node in _nodes(group, stage, live=True)
        )

    def _nearest(self, needs: frozenset[str]) -> list[CapabilityGroup]:
        """The groups that offer the rarest of the needs; without needs, all that have workers."""
        if not needs:
            return [group for group in self._known.values() if group.workers]
        return min((self._offering.get(need, []) for need in needs), key=len)

    def offering(self, stage: str, need: str) -> list[str]:
        """Up to five nodes whose workers of the stage offer it, live ones first."""
        groups = self._offering.get(need, [])
        nodes: dict[str, None] = {}
        for live in (True, False):
            for group in groups:
                for node in _nodes(group, stage, live=live):
                    nodes[node] = None
                    if len(nodes) == NODES_LIMIT:
                        return list(nodes)
        return list(nodes)

    def left_out(self) -> LeftOutOfFleet:
        """What the workers found and do not use: live workers' first, each once with its nodes."""
        listed: dict[AnnouncedLeftOut, dict[str, None]] = {}
        count = 0
        for group in sorted((each for each in self._known.values() if each.workers), key=lambda each: each.rank):
            count += group.capabilities.left_out_count
            for each in group.capabilities.left_out:
                if each in listed or len(listed) < LEFT_OUT_LISTED:
                    listed.setdefault(each, {}).update((member.node, None) for member in group.workers.values())
        return LeftOutOfFleet(
            listed=tuple((each, tuple(islice(nodes, NODES_LIMIT))) for each, nodes in listed.items()), count=count
        )

    def limits_of(self, stage: str, name: str, needs: frozenset[str]) -> list[tuple[str, int | None]]:
        """Up to five nodes whose workers of the stage offer the needs, and what they take, the largest first; None for
        no bound.
        """
        able = [
            (limit_of(group.limits, name), group)
            for group in self._nearest(needs)
            if group.of_stage[stage] and needs <= group.offers
        ]
        able.sort(key=lambda each: (each[0] is not None, -(each[0] or 0), not each[1].live_of_stage[stage]))
        nodes: dict[str, int | None] = {}
        for limit, group in able:
            for live in (True, False):
                for node in _nodes(group, stage, live=live):
                    nodes.setdefault(node, limit)
                    if len(nodes) == NODES_LIMIT:
                        return list(nodes.items())
        return list(nodes.items())

    def with_annotator(self, annotator_id: str) -> list[CapabilityGroup]:
        """Those that offer it, live ones first, in the catalog's order."""
        return sorted(self._offering.get(f"annotator:{annotator_id}", []), key=lambda group: group.rank)


def _nodes(group: CapabilityGroup, stage: str, *, live: bool) -> Iterator[str]:
    return (
        member.node
        for worker, member in group.workers.items()
        if member.stage == stage and (worker in group.live) == live
    )


class WorkerViews:
    """Workers as the scheduler sees them. Reported speeds are bounded by the moving average of alike devices."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        # By worker: its last report, and its plausible values.
        self._step_times: dict[str, tuple[tuple[ReportedStepTime, ...], StepTimes]] = {}
        self._usual_link = RecentMean()
        # By worker: what it delivered, as this gateway measured it.
        self._delivered: dict[str, dict[tuple[str, int], Delivered]] = {}
        self._links: dict[str, Delivered] = {}

    def of(self, worker: Worker, group: CapabilityGroup, avoided: frozenset[str]) -> WorkerView:
        """`avoided`: the needs that the worker is given tasks for only where no other worker can do them."""
        device = self._device(worker.device)
        return WorkerView(
            id=worker.id,
            node=worker.node,
            stage=worker.stage,
            offers=group.offers,
            avoided=avoided,
            limits=group.limits,
            slots=max(1, worker.slots),
            vram=worker.vram_models,
            ram=worker.ram_models,
            held=worker.held_models,
            sizes=group.sizes,
            link_bps=self._link_bps(worker),
            step_times=delivered_times(self._plausible_times(worker, device), self._measured_times(worker.id)),
            usual_times=device.usual_times,
            task_s=TASK_S,
            takes_fetches=worker.takes_fetches,
            disk_bytes=worker.disk_bytes,
            unfetched=worker.unfetched_models,
        )

    def note_task(self, worker_id: str, facts: Facts, took_s: float) -> None:
        """A task with these facts took so long, from lease to result."""
        if not facts.steps or not facts.width_px or took_s <= 0:
            return
        which = facts.family, size_class(facts.width_px, facts.height_px)
        delivered = self._delivered.setdefault(worker_id, {})
        if which in delivered or len(delivered) < DELIVERED_CLASSES_LIMIT:
            step_s = max(took_s - TASK_S, took_s / 2) / facts.steps
            delivered.setdefault(which, Delivered()).note(min(max(step_s, STEP_MIN_S), STEP_MAX_S))

    def note_fetch(self, worker_id: str, size_bytes: int, took_s: float) -> None:
        """It holds a model that it was told to fetch so long ago."""
        if size_bytes and took_s > 0:
            self._links.setdefault(worker_id, Delivered()).note(size_bytes * 8 / took_s)

    def forget(self, worker_id: str) -> None:
        self._step_times.pop(worker_id, None)
        self.forget_delivered(worker_id)

    def forget_delivered(self, worker_id: str) -> None:
        """Its claims count again: it may be quicker now, and gets no tasks that would show it."""
        self._delivered.pop(worker_id, None)
        self._links.pop(worker_id, None)

    def _measured_times(self, worker_id: str) -> StepTimes:
        delivered = self._delivered.get(worker_id, {})
        return {which: each.least for which, each in delivered.items() if each.least}

    def _device(self, name: str) -> "_Device":
        if name not in self._devices:
            if len(self._devices) >= DEVICES_LIMIT:
                del self._devices[next(iter(self._devices))]
            self._devices[name] = _Device()
        return self._devices[name]

    def _plausible_times(self, worker: Worker, device: "_Device") -> StepTimes:
        """A report counts once, however often it is repeated."""
        reported, plausible_times = self._step_times.get(worker.id, ((), {}))
        if reported != worker.step_times:
            before = {(each.family, each.size_class): each for each in reported}
            plausible_times = {
                (each.family, each.size_class): device.bound(
                    each, is_new=before.get((each.family, each.size_class)) != each
                )
                for each in worker.step_times
            }
            self._step_times[worker.id] = worker.step_times, plausible_times
        return plausible_times

    def _link_bps(self, worker: Worker) -> float:
        """As reported, but not much more than its fetches got: those also wait for one another."""
        link_bps = plausible(worker.goodput_bps, self._usual_link.mean) or USUAL_LINK_BPS
        delivered = self._links.get(worker.id)
        if delivered is not None and delivered.largest:
            link_bps = min(link_bps, LINK_OFF * delivered.largest)
        link_bps = min(max(link_bps, LINK_MIN_BPS), LINK_MAX_BPS)
        if worker.goodput_bps:
            self._usual_link.note(link_bps)
        return link_bps


class _Device:
    """What evaluations take on a device on average, by family and size class."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, int], RecentMean] = {}
        # As given to the scheduler; replaced when it changes, so that the same object means the same values.
        self.usual_times: StepTimes = {}

    def bound(self, reported: ReportedStepTime, *, is_new: bool) -> float:
        """The reported time, bounded by the average for the device, family and size; a new report joins the average."""
        which = (reported.family, reported.size_class)
        usual = self._means.get(which)
        time_s = plausible(reported.mean_s, usual.mean if usual else 0.0)
        time_s = min(max(time_s, STEP_MIN_S), STEP_MAX_S)
        if is_new:
            self._note(which, time_s)
        return time_s

    def _note(self, which: tuple[str, int], time_s: float) -> None:
        if which not in self._means and len(self._means) >= CLASSES_LIMIT:
            oldest = next(iter(self._means))
            del self._means[oldest]
            self.usual_times = {each: mean_s for each, mean_s in self.usual_times.items() if each != oldest}
        usual = self._means.setdefault(which, RecentMean())
        usual.note(time_s)
        given = self.usual_times.get(which, 0.0)
        if abs(usual.mean - given) > USUAL_MOVED * given:
            self.usual_times = {**self.usual_times, which: usual.mean}
