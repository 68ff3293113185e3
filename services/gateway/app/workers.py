"""Who works for this gateway, and what they offer together. Kept, so that a restarted gateway still knows."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fanlight.errors import AlreadyExists, Conflict, ResourceExhausted
from services.gateway.app.capabilities import Group, Groups
from services.gateway.app.faults import Faults
from services.gateway.app.leases import Leases
from services.gateway.app.records import WORKERS
from services.gateway.app.standings import Standings
from services.gateway.app.views import Views
from services.gateway.config import GatewaySettings
from services.gateway.jobs.catalog import Catalog, held_by
from services.gateway.jobs.model import Job, task_name
from services.gateway.jobs.workers import Annotator, Capabilities, Worker, WorkerRecord, WorkerStatus
from services.gateway.ordering.board import Board
from services.gateway.ordering.tasks import Amounts
from services.gateway.ports import CaughtUp, Clock, Deleted, JobStore, Record
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "workers"
PAGE = 1_000
# How far the kept time of the last poll may lag.
WRITE_INTERVAL_S = 60.0
# What it holds is told to other gateways no more often.
INVENTORY_INTERVAL_S = 5.0


@dataclass(slots=True)
class _Known:
    record: WorkerRecord
    group: Group
    written_s: float
    # The store's; 0 before the first write.
    revision: int = 0
    polls: int = 0
    live: bool = False
    # As it was written last.
    written_models: frozenset[str] = frozenset()


class Workers:
    """Tells the plan of workers that live, and of those that do not any more."""

    def __init__(
        self, store: JobStore, leases: Leases, faults: Faults, board: Board, clock: Clock, settings: GatewaySettings
    ) -> None:
        self._store = store
        self._board = board
        self._views = Views()
        self._standings = Standings(clock)
        self._faults = faults
        self._leases = leases
        self._clock = clock
        self._settings = settings
        self._groups = Groups(store, clock)
        self._known: dict[str, _Known] = {}
        # Live workers without an open poll, and when they were heard of on the monotonic clock; the longest ago first.
        self._quiet: OrderedDict[str, float] = OrderedDict()

    async def load(self) -> None:
        await self._groups.load()
        page = await self._store.list(BUCKET, limit=PAGE)
        while page:
            for each in page:
                await self._take(each)
            page = await self._store.list(BUCKET, before=page[-1].key, limit=PAGE)

    async def seen(self, worker: Worker, digest: str, capabilities: Capabilities | None) -> bool:
        """Take in what a poll says; False when the capabilities that this worker calls so are not known."""
        known = self._known.get(worker.id)
        is_same = known is not None and known.record.announced_digest == digest
        if capabilities is None and not is_same:
            return False
        if known is None:
            await self._make_room()
        if known is None or (capabilities is not None and capabilities != known.group.capabilities):
            assert capabilities is not None
            group = await self._groups.keep(capabilities)
        else:
            group = known.group
        now_s = self._clock.now_s()
        record = WorkerRecord(
            worker=worker, capabilities_digest=group.digest, announced_digest=digest, last_poll_time_s=now_s
        )
        known = self._known.get(worker.id)
        changed = not is_same or known is None or known.group is not group
        if known is None:
            known = self._add(record, group)
        else:
            self._revise(known, record, group)
        self._hear(known)
        if changed or now_s - known.written_s >= self._write_interval_s(known):
            await self._write(known, now_s)
        self.refresh(worker.id)
        return True

    def _write_interval_s(self, known: _Known) -> float:
        is_other = known.written_models != known.record.worker.held_models
        return INVENTORY_INTERVAL_S if is_other else WRITE_INTERVAL_S

    # What is counted of each: its stage, its group, and what it holds

    def _add(self, record: WorkerRecord, group: Group) -> _Known:
        """It is away until it is heard of."""
        known = self._known[record.worker.id] = _Known(record, group, record.last_poll_time_s)
        self._attach(known)
        return known

    def _revise(self, known: _Known, record: WorkerRecord, group: Group) -> None:
        before, worker = known.record.worker, record.worker
        if known.group is not group or (before.node, before.stage) != (worker.node, worker.stage):
            self._detach(known)
            known.record, known.group = record, group
            self._attach(known)
            return
        known.record = record
        if _places(before) != _places(worker):
            was, now = (set(held_by(each, group.needs_by_id)) for each in (before, worker))
            self._groups.catalog.count_held(was - now, -1, live=known.live)
            self._groups.catalog.count_held(now - was, 1, live=known.live)

    def _drop(self, known: _Known) -> None:
        worker_id = known.record.worker.id
        self._detach(known)
        del self._known[worker_id]
        self._quiet.pop(worker_id, None)
        self._views.forget(worker_id)

    def _attach(self, known: _Known) -> None:
        worker = known.record.worker
        known.group = self._groups.join(known.group, worker.id, worker.node)
        self._groups.set_live(known.group, worker.id, live=known.live)
        self._groups.catalog.count_stage(worker.stage, 1)
        self._count_held(known, 1)

    def _detach(self, known: _Known) -> None:
        worker = known.record.worker
        self._count_held(known, -1)
        self._groups.catalog.count_stage(worker.stage, -1)
        self._groups.leave(known.group, worker.id)

    def _set_live(self, known: _Known, *, live: bool) -> None:
        if known.live == live:
            return
        self._count_held(known, -1)
        known.live = live
        self._groups.set_live(known.group, known.record.worker.id, live=live)
        self._count_held(known, 1)

    def _count_held(self, known: _Known, by: int) -> None:
        held = held_by(known.record.worker, known.group.needs_by_id)
        self._groups.catalog.count_held(held, by, live=known.live)

    # Who lives

    def _hear(self, known: _Known) -> None:
        """It is alive."""
        worker_id = known.record.worker.id
        self._quiet.pop(worker_id, None)
        if not known.polls:
            self._quiet[worker_id] = self._clock.monotonic_s()
        self._set_live(known, live=True)

    def _look_who_lives(self) -> None:
        """Those that were not heard of for a while are away. Before anything is said of who lives."""
        until_s = self._clock.monotonic_s() - self._settings.worker_live_s
        while self._quiet:
            worker_id, heard_s = next(iter(self._quiet.items()))
            if heard_s > until_s:
                return
            del self._quiet[worker_id]
            if known := self._known.get(worker_id):
                self._set_live(known, live=False)

    def _is_live(self, known: _Known) -> bool:
        self._look_who_lives()
        return known.live

    def refresh(self, worker_id: str) -> None:
        """Tell the plan what it may count on now."""
        known = self._known.get(worker_id)
        if known is None or known.record.worker.draining or self.draining_reason(worker_id):
            self._board.gone(worker_id, self._clock.monotonic_s())
        elif self._is_live(known):
            view = self._views.of(known.record.worker, known.group, self._offered(known))
            self._board.seen(view, self._clock.monotonic_s())

    def retire_silent(self) -> None:
        """What was planned for those that were not heard of lately goes elsewhere."""
        for worker_id in self._board.workers:
            known = self._known.get(worker_id)
            if known is None or not self._is_live(known):
                self._board.gone(worker_id, self._clock.monotonic_s())

    def observe(self, job: Job) -> None:
        """Learn from what came of tasks how fast and how good workers are."""
        self._standings.observe(job, self._device_of)

    def _device_of(self, worker_id: str) -> str:
        known = self._known.get(worker_id)
        return known.record.worker.device if known else ""

    def draining_reason(self, worker_id: str) -> str:
        """Why the gateway gives it no more; empty while it does."""
        return self._standings.fault_of(worker_id)

    async def follow(self) -> None:
        """Take in what workers said to other gateways."""
        async for change in self._store.watch(BUCKET):
            if isinstance(change, Deleted):
                known = self._known.get(change.key)
                if known is not None and not self._is_live(known):
                    self._drop(known)
            elif not isinstance(change, CaughtUp):
                await self._take(change)
                self.refresh(change.key)

    async def _take(self, change: Record) -> None:
        known = self._known.get(change.key)
        if known is not None and known.revision >= change.revision:
            return
        record = WORKERS.read(BUCKET, change)
        if record is None:
            return
        group = await self._groups.get(record.capabilities_digest)
        if group is None:
            # Another gateway is just forgetting them. The worker is asked for them when it comes.
            log.warning("capabilities_missing", worker=change.key, digest=record.capabilities_digest)
            return
        known = self._known.get(change.key)
        if known is None:
            known = self._add(record, group)
        elif known.polls == 0:
            self._revise(known, record, group)
        known.revision = max(known.revision, change.revision)

    def is_known(self, worker_id: str) -> bool:
        return worker_id in self._known

    def heard(self, worker_id: str) -> None:
        """It is alive: it talks to another gateway."""
        self.touch(worker_id)
        self.refresh(worker_id)
        self._board.heard(worker_id, self._clock.monotonic_s())

    def touch(self, worker_id: str) -> None:
        """It is alive: it renewed a lease."""
        if known := self._known.get(worker_id):
            self._hear(known)

    def begin_poll(self, worker_id: str) -> None:
        known = self._known[worker_id]
        known.polls += 1
        self._hear(known)
        self._board.asks(worker_id, self._clock.monotonic_s())

    def end_poll(self, worker_id: str) -> None:
        if known := self._known.get(worker_id):
            known.polls -= 1
            self._hear(known)
        self._board.answered(worker_id, self._clock.monotonic_s())

    async def _write(self, known: _Known, now_s: float) -> None:
        await self._groups.make_sure(known.group)
        known.written_s, known.written_models = now_s, known.record.worker.held_models
        key, value = known.record.worker.id, WORKERS.encode(known.record)
        try:
            if known.revision:
                written = await self._store.put(BUCKET, key, value, revision=known.revision)
            else:
                written = await self._store.create(BUCKET, key, value)
        except (AlreadyExists, Conflict):
            present = await self._store.get(BUCKET, key)
            known.revision = present.revision if present else 0
            known.written_s = 0.0
        else:
            known.revision = written.revision

    def _offered(self, known: _Known) -> frozenset[str]:
        """Less what its node has failed at too often lately."""
        skipped = self._faults.skipped(known.record.worker.node)
        return known.group.offers - skipped if skipped & known.group.offers else known.group.offers

    # What they offer together

    def catalog(self) -> Catalog:
        """All that known workers offer; what requests are checked against. Read it before the next await."""
        self._look_who_lives()
        return self._groups.catalog

    def residency_of(self, kind: str, name: str) -> int:
        """Where workers hold a model, or an annotator's: the contract's number for the best place; REMOTE for none."""
        return self.catalog().residency_of(kind, name)

    def can_any(self, needs: frozenset[str], amounts: Amounts = (), *, only_live: bool = False) -> bool:
        """Whether some known worker can do what needs all of them together, and takes that much."""
        self._look_who_lives()
        return self._groups.can_any(needs, amounts, only_live=only_live)

    def offering(self, need: str) -> list[str]:
        """Up to five nodes that offer it, live ones first; for messages."""
        self._look_who_lives()
        return self._groups.offering(need)

    def limits_of(self, name: str, needs: frozenset[str] = frozenset()) -> list[tuple[str, int | None]]:
        """Up to five nodes that offer the needs, and the most that they take, the largest first; None for no bound."""
        self._look_who_lives()
        return self._groups.limits_of(name, needs)

    def variants(self, annotator_id: str) -> Sequence[Annotator]:
        """The annotator in every version and on every device that a worker announced, live ones first."""
        self._look_who_lives()
        distinct: dict[tuple[str, str], Annotator] = {}
        for group in self._groups.with_annotator(annotator_id):
            annotator = group.annotators[annotator_id]
            distinct.setdefault((annotator.version, annotator.device), annotator)
        return list(distinct.values())

    def annotator_of(self, worker_id: str, annotator_id: str) -> Annotator | None:
        """The annotator as that worker announced it."""
        known = self._known.get(worker_id)
        return known.group.annotators.get(annotator_id) if known else None

    def model_kind(self, worker_id: str, model_id: str) -> str:
        """Such as `lora`; empty where the worker offers no such model."""
        known = self._known.get(worker_id)
        needs = known.group.needs_by_id.get(model_id, ()) if known else ()
        return needs[0].partition(":")[0] if needs else ""

    def _rank(self, known: _Known) -> tuple[bool, float]:
        return self._is_live(known), known.record.last_poll_time_s

    def statuses(self) -> Sequence[WorkerStatus]:
        """The workers that asked for work lately."""
        since_s = self._clock.now_s() - self._settings.worker_listed_s
        return [
            self._status(known)
            for known in sorted(self._known.values(), key=self._rank, reverse=True)
            if self._is_live(known) or known.record.last_poll_time_s >= since_s
        ]

    def _status(self, known: _Known) -> WorkerStatus:
        worker = known.record.worker
        return WorkerStatus(
            worker=worker,
            last_poll_time_s=known.record.last_poll_time_s,
            live=self._is_live(known),
            tasks=tuple(task_name(*held.key) for held in self._leases.of_worker(worker.id)),
            draining_reason=self.draining_reason(worker.id),
        )

    async def sweep(self) -> None:
        """Forget those that went away long ago, and capabilities that nobody announces any more."""
        until_s = self._clock.now_s() - self._settings.worker_retention_s
        await self._forget(
            known
            for known in self._known.values()
            if known.record.last_poll_time_s < until_s and not self._is_live(known)
        )
        await self._groups.sweep()

    async def _make_room(self) -> None:
        """Forget the one that was away longest, if there are too many. ResourceExhausted when all are live."""
        if len(self._known) < self._settings.worker_limit:
            return
        oldest = min(self._known.values(), key=self._rank)
        if self._is_live(oldest):
            raise ResourceExhausted(
                f"{self._settings.worker_limit} workers are here already", retry_after_s=self._settings.retry_after_s
            )
        await self._forget([oldest])

    async def _forget(self, gone: Iterable[_Known]) -> None:
        for known in list(gone):
            worker_id = known.record.worker.id
            if self._known.get(worker_id) is known:
                self._drop(known)
            self._standings.forget(worker_id)
            self._board.gone(worker_id, self._clock.monotonic_s())
            await self._store.delete(BUCKET, worker_id)


def _places(worker: Worker) -> tuple[frozenset[str], ...]:
    return worker.vram_models, worker.ram_models, worker.disk_models
