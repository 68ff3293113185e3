"""Who works for this gateway, and what they offer together. Kept, so that a restarted gateway still knows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.gateway.app.faults import Faults
from services.gateway.app.leases import Leases
from services.gateway.app.records import WORKERS
from services.gateway.app.standings import Standings
from services.gateway.app.views import Views
from services.gateway.config import GatewaySettings
from services.gateway.jobs.model import Job, task_name
from services.gateway.jobs.workers import (
    Annotator,
    Capabilities,
    Catalog,
    Worker,
    WorkerRecord,
    WorkerStatus,
    catalog_of,
)
from services.gateway.ordering.board import Board
from services.gateway.ports import CaughtUp, Clock, Deleted, JobStore, Record
from services.kernel.errors import AlreadyExists, Conflict, ResourceExhausted

BUCKET = "workers"
PAGE = 1_000
# How far the kept time of the last poll may lag.
WRITE_INTERVAL_S = 60.0
# What it holds is told to other gateways no more often.
INVENTORY_INTERVAL_S = 5.0


@dataclass(slots=True)
class _Known:
    record: WorkerRecord
    offers: frozenset[str]
    written_s: float
    # The store's; 0 before the first write.
    revision: int = 0
    # On the monotonic clock; None for one that this process has not heard of yet.
    seen_s: float | None = None
    polls: int = 0
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
        self._known: dict[str, _Known] = {}

    async def load(self) -> None:
        page = await self._store.list(BUCKET, limit=PAGE)
        while page:
            for each in page:
                record = WORKERS.decode(each.value)
                self._known[each.key] = _Known(
                    record, record.capabilities.offers, record.last_poll_time_s, revision=each.revision
                )
            page = await self._store.list(BUCKET, before=page[-1].key, limit=PAGE)

    async def seen(self, worker: Worker, digest: str, capabilities: Capabilities | None) -> bool:
        """Take in what a poll says; False when the capabilities of that digest are not known."""
        known = self._known.get(worker.id)
        if capabilities is None:
            if known is None or known.record.capabilities_digest != digest:
                return False
            capabilities = known.record.capabilities
        if known is None:
            await self._make_room()
        now_s = self._clock.now_s()
        record = WorkerRecord(
            worker=worker, capabilities=capabilities, capabilities_digest=digest, last_poll_time_s=now_s
        )
        changed = known is None or known.record.capabilities_digest != digest
        if known is None:
            known = self._known[worker.id] = _Known(record, frozenset(), now_s)
        known.record = record
        known.seen_s = self._clock.monotonic_s()
        if changed:
            known.offers = capabilities.offers
        if changed or now_s - known.written_s >= self._write_interval_s(known):
            await self._write(known, now_s)
        self.refresh(worker.id)
        return True

    def _write_interval_s(self, known: _Known) -> float:
        is_other = known.written_models != known.record.worker.held_models
        return INVENTORY_INTERVAL_S if is_other else WRITE_INTERVAL_S

    def refresh(self, worker_id: str) -> None:
        """Tell the plan what it may count on now."""
        known = self._known.get(worker_id)
        if known is None or known.record.worker.draining or self.draining_reason(worker_id):
            self._board.gone(worker_id, self._clock.monotonic_s())
        elif self._is_live(known):
            view = self._views.of(known.record, self._offered(known))
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
                    del self._known[change.key]
            elif not isinstance(change, CaughtUp):
                self._take(change)

    def _take(self, change: Record) -> None:
        known = self._known.get(change.key)
        if known is not None and known.revision >= change.revision:
            return
        record = WORKERS.decode(change.value)
        if known is None:
            known = self._known[change.key] = _Known(record, record.capabilities.offers, record.last_poll_time_s)
        if known.polls == 0:
            known.record, known.offers = record, record.capabilities.offers
        known.revision = change.revision
        self.refresh(change.key)

    def is_known(self, worker_id: str) -> bool:
        return worker_id in self._known

    def heard(self, worker_id: str) -> None:
        """It is alive: it talks to another gateway."""
        self.touch(worker_id)
        self.refresh(worker_id)
        self._board.heard(worker_id, self._clock.monotonic_s())

    def can_any(self, needs: frozenset[str], *, only_live: bool = False) -> bool:
        """Whether some known worker offers all of them together."""
        return any(needs <= known.offers and (not only_live or self._is_live(known)) for known in self._known.values())

    def touch(self, worker_id: str) -> None:
        """It is alive: it renewed a lease."""
        if known := self._known.get(worker_id):
            known.seen_s = self._clock.monotonic_s()

    def begin_poll(self, worker_id: str) -> None:
        self._known[worker_id].polls += 1
        self._board.asks(worker_id, self._clock.monotonic_s())

    def end_poll(self, worker_id: str) -> None:
        if known := self._known.get(worker_id):
            known.polls -= 1
            known.seen_s = self._clock.monotonic_s()
        self._board.answered(worker_id, self._clock.monotonic_s())

    async def _write(self, known: _Known, now_s: float) -> None:
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
        return known.offers - self._faults.skipped(known.record.worker.node)

    def _is_live(self, known: _Known) -> bool:
        if known.seen_s is None:
            return False
        return known.polls > 0 or self._clock.monotonic_s() - known.seen_s < self._settings.worker_live_s

    def catalog(self) -> Catalog:
        """All that known workers offer, live ones first; what requests are checked against."""
        known = self._best_first()
        stages = (each.record.worker.stage for each in known)
        distinct: dict[str, Capabilities] = {}
        for each in known:
            distinct.setdefault(each.record.capabilities_digest, each.record.capabilities)
        return catalog_of(stages, list(distinct.values()))

    def variants(self, annotator_id: str) -> Sequence[Annotator]:
        """The annotator in every version and on every device that a worker announced, live ones first."""
        distinct: dict[tuple[str, str], Annotator] = {}
        for known in self._best_first():
            if f"annotator:{annotator_id}" in known.offers:
                annotator = known.record.capabilities.annotator(annotator_id)
                distinct.setdefault((annotator.version, annotator.device), annotator)
        return list(distinct.values())

    def annotator_of(self, worker_id: str, annotator_id: str) -> Annotator | None:
        """The annotator as that worker announced it."""
        known = self._known.get(worker_id)
        if known is None or f"annotator:{annotator_id}" not in known.offers:
            return None
        return known.record.capabilities.annotator(annotator_id)

    def model_kind(self, worker_id: str, model_id: str) -> str:
        """Such as `lora`; empty where the worker offers no such model."""
        known = self._known.get(worker_id)
        models = known.record.capabilities.models if known else ()
        return next((model.kind for model in models if model.id == model_id), "")

    def _best_first(self) -> list[_Known]:
        def rank(known: _Known) -> tuple[bool, float]:
            return self._is_live(known), known.record.last_poll_time_s

        return sorted(self._known.values(), key=rank, reverse=True)

    def statuses(self) -> Sequence[WorkerStatus]:
        """The workers that asked for work lately."""
        since_s = self._clock.now_s() - self._settings.worker_listed_s
        return [
            self._status(known)
            for known in self._best_first()
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
        """Forget those that went away long ago."""
        until_s = self._clock.now_s() - self._settings.worker_retention_s
        await self._forget(
            known
            for known in self._known.values()
            if known.record.last_poll_time_s < until_s and not self._is_live(known)
        )

    async def _make_room(self) -> None:
        """Forget the one that was away longest, if there are too many. ResourceExhausted when all are live."""
        if len(self._known) < self._settings.worker_limit:
            return
        oldest = self._best_first()[-1]
        if self._is_live(oldest):
            raise ResourceExhausted(
                f"{self._settings.worker_limit} workers are here already", retry_after_s=self._settings.retry_after_s
            )
        await self._forget([oldest])

    async def _forget(self, gone: Iterable[_Known]) -> None:
        for known in list(gone):
            worker_id = known.record.worker.id
            self._known.pop(worker_id, None)
            self._standings.forget(worker_id)
            self._board.gone(worker_id, self._clock.monotonic_s())
            await self._store.delete(BUCKET, worker_id)
