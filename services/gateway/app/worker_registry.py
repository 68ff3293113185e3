"""The known workers, which of them live, and which are stragglers. What they offer together is in `fleet_offers`.

Kept in the store, so that a restarted gateway still knows them. What a worker is given is for the scheduler to say.
"""

import contextlib
import hmac
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from fanlight.errors import AlreadyExists, Conflict, PermissionDenied, ResourceExhausted, Unavailable
from services.gateway.app.capabilities import CapabilityGroup, CapabilityGroups, WorkerViews
from services.gateway.app.circuit_breakers import Avoidances, CircuitBreakers, StragglerDetector
from services.gateway.app.fleet_offers import FleetOffers, KnownWorker, left_out
from services.gateway.app.job_store import WORKERS
from services.gateway.app.leases import LeaseTable, MeasuredSpeed
from services.gateway.app.records import Records
from services.gateway.app.source_backoffs import SourceBackoffs
from services.gateway.config import GatewayLimits
from services.gateway.domain.circuit_breaker import BreakerKey
from services.gateway.domain.fleet_catalog import held_by
from services.gateway.domain.job import Facts, Job, task_name
from services.gateway.domain.offers import OfferRules
from services.gateway.domain.workers import Avoidance, Capabilities, Worker, WorkerRecord, WorkerStatus
from services.gateway.ports import CaughtUp, Clock, Deleted, Record
from services.gateway.scheduler.schedule import Scheduler
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "workers"
PAGE = 1_000
# For how long after its last task a worker's measured speeds count.
MEASURED_S = 900.0
# How far the stored time of the last poll may lag.
WRITE_INTERVAL_S = 60.0
# Changed models are written for other gateways at most this often.
INVENTORY_INTERVAL_S = 5.0
# Of one node and stage, alive at the same time.
WORKERS_OF_A_NODE = 64


class WorkerRegistry:
    """Keeps the scheduler informed of workers that live, and of those that went away."""

    def __init__(
        self,
        store: Records,
        leases: LeaseTable,
        breakers: CircuitBreakers,
        sources: SourceBackoffs,
        scheduler: Scheduler,
        clock: Clock,
        limits: GatewayLimits,
        rules: OfferRules,
        *,
        default_model: str = "",
    ) -> None:
        """`default_model`: the operator's; empty for none."""
        self._store = store
        self._scheduler = scheduler
        self._views = WorkerViews()
        self._stragglers = StragglerDetector(
            clock, device_of=self.device_of, live_of=self._live_of, note_task=self._note_task
        )
        self._avoidances = Avoidances(breakers, sources, self._stragglers, clock)
        self._leases = leases
        self._clock = clock
        self._limits = limits
        self._groups = CapabilityGroups(store, clock, rules, default_model=default_model)
        self._known: dict[str, KnownWorker] = {}
        # What requests are checked against, and results.
        self.offers = FleetOffers(self._groups, self._known, self._update_live)
        # By node and stage.
        self._at: dict[tuple[str, str], dict[str, KnownWorker]] = {}
        # Live workers without an open poll, and when they last called, in monotonic seconds; the longest ago first.
        self._quiet: OrderedDict[str, float] = OrderedDict()

    async def load(self) -> None:
        await self._groups.load()
        page = await self._store.list(BUCKET, limit=PAGE)
        while page:
            for each in page:
                await self._take(each)
            page = await self._store.list(BUCKET, before=page[-1].key, limit=PAGE)

    def require_process(self, worker_id: str, secret_hash: str) -> None:
        """PermissionDenied for a poll under the id of a worker whose process has another secret."""
        known = self._known.get(worker_id)
        if known is not None and not hmac.compare_digest(known.record.secret_hash, secret_hash):
            raise PermissionDenied("is the id of another worker's process; choose an id of your own", field="worker.id")

    async def seen(
        self, worker: Worker, digest: str, capabilities: Capabilities | None, *, secret_hash: str = ""
    ) -> bool:
        """Take in what a poll reports; False where the capabilities with its digest are not known of this worker."""
        known = self._known.get(worker.id)
        is_same = known is not None and known.record.announced_digest == digest
        if capabilities is None and not is_same:
            return False
        if known is None:
            self._require_few(worker)
            await self._make_room()
        if known is None or (capabilities is not None and capabilities != known.group.capabilities):
            assert capabilities is not None
            group = await self._groups.keep(capabilities)
        else:
            group = known.group
        now_s = self._clock.now_s()
        record = WorkerRecord(
            worker=worker,
            capabilities_digest=group.digest,
            announced_digest=digest,
            last_poll_time_s=now_s,
            secret_hash=secret_hash,
        )
        known = self._known.get(worker.id)
        is_new = known is None
        changed = not is_same or known is None or known.group is not group
        if known is None:
            known = self._add(record, group)
            known.come_s = self._clock.monotonic_s()
        else:
            changed = changed or known.record.worker.draining != worker.draining
            self._revise(known, record, group)
        self._hear(known)
        if changed or now_s - known.written_s >= self._write_interval_s(known):
            await self._write(known, now_s)
        self.refresh(worker.id)
        if is_new:
            self._update_live()
            await self._forget([each for each in self._at.get(known.place, {}).values() if self._is_replaced(each)])
        return True

    def with_holdings(self, worker: Worker, digest: str) -> Worker | None:
        """The worker with the models of its last poll at this gateway, if that had the digest."""
        known = self._known.get(worker.id)
        if known is None or not digest or known.holdings_digest != digest:
            return None
        held = known.record.worker
        return replace(
            worker,
            vram_models=held.vram_models,
            ram_models=held.ram_models,
            disk_models=held.disk_models,
            unfetched_models=held.unfetched_models,
        )

    def note_holdings(self, worker_id: str, digest: str) -> None:
        """What `seen` was just told of the worker has that digest."""
        if known := self._known.get(worker_id):
            known.holdings_digest = digest

    def _require_few(self, worker: Worker) -> None:
        """ResourceExhausted where the node has as many live workers as one machine can have."""
        places = [self._at.get((worker.node, worker.stage), {})]
        if sum(known.live for place in places for known in place.values()) >= WORKERS_OF_A_NODE:
            raise ResourceExhausted(
                f"{WORKERS_OF_A_NODE} workers of node {worker.node[:64]} run for {worker.stage} already",
                retry_after_s=self._limits.retry_after_s,
            )

    def live_ids(self) -> Sequence[str]:
        return [each for each, known in self._known.items() if known.live]

    def _is_replaced(self, known: KnownWorker) -> bool:
        """It went away, and was not heard of since a newer worker of its node and stage came."""
        others = self._at.get(known.place, {}).values()
        return not known.live and any(each.come_s > known.heard_s for each in others if each is not known)

    def _write_interval_s(self, known: KnownWorker) -> float:
        is_other = known.written_models != known.record.worker.held_models
        return INVENTORY_INTERVAL_S if is_other else WRITE_INTERVAL_S

    # Counters by stage, group and held models

    def _add(self, record: WorkerRecord, group: CapabilityGroup) -> KnownWorker:
        """Add a worker, not live until it calls."""
        known = self._known[record.worker.id] = KnownWorker(record, group, record.last_poll_time_s)
        self._attach(known)
        return known

    def _revise(self, known: KnownWorker, record: WorkerRecord, group: CapabilityGroup) -> None:
        before, worker = known.record.worker, record.worker
        is_moved = (before.node, before.stage) != (worker.node, worker.stage)
        if known.group is not group or is_moved or before.draining != worker.draining:
            self._detach(known)
            known.record, known.group = record, group
            self._attach(known)
            return
        known.record = record
        self._note_fetched(worker.id, worker.held_models - before.held_models)
        if _places(before) != _places(worker) and known.is_counted:
            was, now = (set(held_by(each, group.needs_by_id)) for each in (before, worker))
            for held, by in ((was - now, -1), (now - was, 1)):
                self._groups.catalog.count_held(held, by, live=known.live, stage=worker.stage)

    def _note_task(self, worker_id: str, facts: Facts, took_s: float) -> None:
        if known := self._known.get(worker_id):
            self._views.note_task(worker_id, facts, took_s)
            known.measured_s = self._clock.monotonic_s()

    def _note_fetched(self, worker_id: str, models: frozenset[str]) -> None:
        """It holds these now, and did not before."""
        state = self._scheduler.worker(worker_id)
        for model in models if state else ():
            fetch = state.fetches.get(model) if state else None
            if state and fetch and model in state.reported_fetches:
                self._known[worker_id].measured_s = self._clock.monotonic_s()
                self._views.note_fetch(worker_id, fetch.size_bytes, self._clock.monotonic_s() - fetch.start_s)

    def _drop(self, known: KnownWorker) -> None:
        worker_id = known.record.worker.id
        self._detach(known)
        del self._known[worker_id]
        self._quiet.pop(worker_id, None)
        self._views.forget(worker_id)

    def _attach(self, known: KnownWorker) -> None:
        worker = known.record.worker
        self._at.setdefault(known.place, {})[worker.id] = known
        if not known.is_counted:
            known.group = self._groups.keep_for(known.group, worker.id)
            return
        known.group = self._groups.join(known.group, worker.id, worker.node, worker.stage)
        self._groups.set_live(known.group, worker.id, live=known.live)
        self._groups.catalog.count_stage(worker.stage, 1)
        self._count_held(known, 1)

    def _detach(self, known: KnownWorker) -> None:
        worker = known.record.worker
        del self._at[known.place][worker.id]
        if not self._at[known.place]:
            del self._at[known.place]
        if known.is_counted:
            self._count_held(known, -1)
            self._groups.catalog.count_stage(worker.stage, -1)
        self._groups.leave(known.group, worker.id)

    def _set_live(self, known: KnownWorker, *, live: bool) -> None:
        if known.live == live:
            return
        if not known.is_counted:
            known.live = live
            return
        self._count_held(known, -1)
        known.live = live
        self._groups.set_live(known.group, known.record.worker.id, live=live)
        self._count_held(known, 1)

    def _set_replaced(self, known: KnownWorker, *, replaced: bool) -> None:
        if known.replaced != replaced:
            self._detach(known)
            known.replaced = replaced
            self._attach(known)

    def _count_held(self, known: KnownWorker, by: int) -> None:
        worker = known.record.worker
        held = held_by(worker, known.group.needs_by_id)
        self._groups.catalog.count_held(held, by, live=known.live, stage=worker.stage)

    # Liveness

    def _hear(self, known: KnownWorker) -> None:
        """It called just now, so it is live."""
        worker_id = known.record.worker.id
        known.heard_s = self._clock.monotonic_s()
        self._quiet.pop(worker_id, None)
        if not known.polls:
            self._quiet[worker_id] = known.heard_s
        self._set_replaced(known, replaced=False)
        self._set_live(known, live=True)

    def _update_live(self) -> None:
        """Mark workers that did not call for a while as away; called before liveness is read."""
        until_s = self._clock.monotonic_s() - self._limits.worker_live_s
        while self._quiet:
            worker_id, heard_s = next(iter(self._quiet.items()))
            if heard_s > until_s:
                return
            del self._quiet[worker_id]
            if known := self._known.get(worker_id):
                self._set_live(known, live=False)
                self._set_replaced(known, replaced=self._is_replaced(known))

    def _is_live(self, known: KnownWorker) -> bool:
        self._update_live()
        return known.live

    def refresh(self, worker_id: str) -> None:
        """Give the scheduler the worker's present view, or take the worker from it."""
        known = self._known.get(worker_id)
        if known is None or known.record.worker.draining:
            self._scheduler.gone(worker_id, self._clock.monotonic_s())
        elif self._is_live(known):
            if self._clock.monotonic_s() - known.measured_s > MEASURED_S:
                self._views.forget_delivered(worker_id)
            avoided = frozenset(each.need for each in self.avoidances_of(worker_id))
            view = self._views.of(known.record.worker, known.group, avoided)
            self._scheduler.seen(view, self._clock.monotonic_s())

    def retire_silent(self) -> None:
        """Take workers that went away from the scheduler; what was planned for them goes elsewhere."""
        for worker_id in self._scheduler.workers:
            known = self._known.get(worker_id)
            if known is None or not self._is_live(known):
                self._scheduler.gone(worker_id, self._clock.monotonic_s())

    def observe(self, job: Job) -> None:
        """Learn from the outcomes of tasks how fast and how reliable workers are."""
        self._stragglers.observe(job)

    def device_of(self, worker_id: str) -> str:
        """Empty for an unknown worker."""
        known = self._known.get(worker_id)
        return known.record.worker.device if known else ""

    def nodes_beside(self, stage: str, device: str) -> frozenset[str]:
        """The nodes of live workers of the stage on other devices."""
        workers = [self._known[each].record.worker for each in self._live_of(stage)]
        return frozenset(each.node for each in workers if each.device != device)

    def _live_of(self, stage: str) -> Iterator[str]:
        """The ids of the live workers of a stage that take tasks."""
        self._update_live()
        for worker_id, known in self._known.items():
            if known.live and known.record.worker.stage == stage and not known.record.worker.draining:
                yield worker_id

    def measured_speed(self, worker_id: str, family: str, size_class: int) -> MeasuredSpeed:
        """As the worker itself measured it; for images of an unknown size, 0, the longest of the family."""
        known = self._known.get(worker_id)
        if known is None:
            return MeasuredSpeed()
        worker = known.record.worker
        times = [
            time.mean_s for time in worker.step_times if time.family == family and size_class in (0, time.size_class)
        ]
        return MeasuredSpeed(evaluation_s=max(times, default=None), slots=worker.slots)

    def draining_reason(self, worker_id: str) -> str:
        """Why the gateway gives it no tasks that others can do; empty while it does."""
        return self._stragglers.fault_of(worker_id)

    async def follow(self) -> None:
        """Take in what workers reported to other gateways."""
        async for change in self._store.watch(BUCKET):
            if isinstance(change, Deleted):
                known = self._known.get(change.key)
                if known is not None and not self._is_live(known):
                    self._drop(known)
                elif known is not None:
                    # The store lost it: written again with its next poll, and with what it can do.
                    known.revision, known.written_s, known.group.checked_s = 0, 0.0, 0.0
            elif not isinstance(change, CaughtUp):
                # Where the store is away just now, the worker's next record comes.
                with contextlib.suppress(Unavailable):
                    await self._take(change)
                self.refresh(change.key)

    async def _take(self, change: Record) -> None:
        known = self._known.get(change.key)
        if known is not None and known.revision >= change.revision:
            return
        record = self._store.read(WORKERS, BUCKET, change)
        if record is None:
            return
        group = await self._groups.get(record.capabilities_digest)
        if group is None:
            # Another gateway is just deleting them. The worker is asked for them at its next poll.
            log.warning("capabilities_missing", worker=change.key, digest=record.capabilities_digest)
            return
        known = self._known.get(change.key)
        if known is None:
            known = self._add(record, group)
        elif known.polls == 0:
            self._revise(known, record, group)
            known.holdings_digest = ""
        known.revision = max(known.revision, change.revision)

    def is_known(self, worker_id: str) -> bool:
        return worker_id in self._known

    def seen_elsewhere(self, worker_id: str) -> None:
        """It is live: it called another gateway."""
        self.touch(worker_id)
        self.refresh(worker_id)
        self._scheduler.heard(worker_id, self._clock.monotonic_s())

    def touch(self, worker_id: str) -> None:
        """It is live: it renewed a lease."""
        if known := self._known.get(worker_id):
            self._hear(known)

    def begin_poll(self, worker_id: str) -> None:
        known = self._known[worker_id]
        known.polls += 1
        self._hear(known)
        self._scheduler.asks(worker_id, self._clock.monotonic_s())

    def end_poll(self, worker_id: str) -> None:
        if known := self._known.get(worker_id):
            known.polls -= 1
            self._hear(known)
        self._scheduler.answered(worker_id, self._clock.monotonic_s())

    async def _write(self, known: KnownWorker, now_s: float) -> None:
        await self._groups.ensure_stored(known.group)
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

    def avoidances_of(self, worker_id: str) -> Sequence[Avoidance]:
        """Tasks that the worker gets only where no other worker can do them."""
        known = self._known.get(worker_id)
        return self._avoidances.of(known.record.worker) if known else ()

    def key_of(self, worker_id: str, stage: str, need: str) -> BreakerKey:
        """The circuit breaker of the worker's node that counts failures and successes of the need."""
        return BreakerKey(stage=stage, device=self.device_of(worker_id), need=need)

    def _rank(self, known: KnownWorker) -> tuple[bool, float]:
        return self._is_live(known), known.record.last_poll_time_s

    def statuses(self, *, of_all: bool = False) -> Sequence[WorkerStatus]:
        """The workers that polled lately, or all that are known."""
        since_s = 0.0 if of_all else self._clock.now_s() - self._limits.worker_listed_s
        return [
            self._status(known)
            for known in sorted(self._known.values(), key=self._rank, reverse=True)
            if self._is_live(known) or known.record.last_poll_time_s >= since_s
        ]

    def _status(self, known: KnownWorker) -> WorkerStatus:
        worker = known.record.worker
        return WorkerStatus(
            worker=worker,
            last_poll_time_s=known.record.last_poll_time_s,
            live=self._is_live(known),
            tasks=tuple(task_name(*held.key) for held in self._leases.of_worker(worker.id)),
            draining_reason=self.draining_reason(worker.id),
            avoided=(*self.avoidances_of(worker.id), *left_out(known.group)),
        )

    async def sweep(self) -> None:
        """Delete workers that went away long ago or were replaced, and capabilities that no worker announces."""
        self._update_live()
        until_s = self._clock.now_s() - self._limits.worker_retention_s
        await self._forget(
            known
            for known in self._known.values()
            if not known.live and (known.replaced or known.record.last_poll_time_s < until_s)
        )
        await self._groups.sweep()

    async def _make_room(self) -> None:
        """Delete the worker that was away longest, if there are too many. ResourceExhausted where all are live."""
        if len(self._known) < self._limits.worker_limit:
            return
        oldest = min(self._known.values(), key=self._rank)
        if self._is_live(oldest):
            raise ResourceExhausted(
                f"there are {self._limits.worker_limit} workers already", retry_after_s=self._limits.retry_after_s
            )
        await self._forget([oldest])

    async def _forget(self, gone: Iterable[KnownWorker]) -> None:
        for known in list(gone):
            worker_id = known.record.worker.id
            if self._known.get(worker_id) is known:
                self._drop(known)
            self._stragglers.forget(worker_id)
            self._scheduler.gone(worker_id, self._clock.monotonic_s())
            await self._store.delete(BUCKET, worker_id)


def _places(worker: Worker) -> tuple[frozenset[str], ...]:
    return worker.vram_models, worker.ram_models, worker.disk_models
