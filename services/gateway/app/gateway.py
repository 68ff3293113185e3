"""The gateway's parts, wired, and their background loops: expiry, sweeps, webhooks, heartbeats."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from fanlight.contract.shipped import ShippedAnnotator, shipped_annotators
from fanlight.errors import FanlightError, NotFound, Unavailable
from services.gateway.app import (
    audit_log,
    capabilities,
    circuit_breakers,
    control_cache,
    dead_letters,
    job_store,
    keys,
    nodes,
    prefetch,
    quotas,
    sealing,
    webhooks,
    worker_registry,
)
from services.gateway.app.completion import Completion
from services.gateway.app.control_cache import CacheFigures, ControlImageCache
from services.gateway.app.core import core_of
from services.gateway.app.data_keys import DataKeys
from services.gateway.app.dead_letters import DeadLetters, Redrives
from services.gateway.app.deletion import Deletions
from services.gateway.app.explain import Explainer
from services.gateway.app.image_checks import ImageChecks
from services.gateway.app.inline_inputs import InlineInputs
from services.gateway.app.job_store import PROBE_INTERVAL_S, IdempotencyKeys, StoreProbe
from services.gateway.app.jobs import Jobs
from services.gateway.app.keys import Keys
from services.gateway.app.lease_rights import ImagesOf, LeaseRights
from services.gateway.app.leases import RandomBytes
from services.gateway.app.leasing import Polls
from services.gateway.app.moderation import Moderation
from services.gateway.app.nodes import Nodes
from services.gateway.app.prefetch import PrefetchClaims
from services.gateway.app.records import Codec, DamagedRecord, Records, refuse_other_format
from services.gateway.app.result_checks import Judge, ResultChecks, TaskChecks
from services.gateway.app.retention import BlobRetention, ClockWatch, JobRetention
from services.gateway.app.sealing import Sealing
from services.gateway.app.submission import JobPlanner, SourceImages
from services.gateway.app.tenant_deletion import TenantDeletions
from services.gateway.app.webhooks import WebhookOptions
from services.gateway.config import GatewayLimits, GatewaySettings
from services.gateway.domain.circuit_breaker import FAILURES_MAX
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Claim, Job, StageRequest, Task
from services.gateway.domain.nodes import NodeRecord, node_of
from services.gateway.ports import Clock, RecordStore
from services.kernel.blobs import BlobStore
from services.kernel.logs import get_logger

log = get_logger()

EXPIRY_INTERVAL_S = 1.0
# The reason of the circuit breaker of a node that other nodes proved wrong.
FALSE_RESULT = "RESULT_FALSE"
# An expiry round that is later than this means that the whole process stood still.
STANDSTILL_S = 2.0
WEBHOOK_INTERVAL_S = 1.0
SWEEP_INTERVAL_S = 60.0
# Those whose records have a format version.
BUCKETS = (
    audit_log.BUCKET,
    audit_log.CHAINS_BUCKET,
    control_cache.BUCKET,
    capabilities.BUCKET,
    dead_letters.BUCKET,
    circuit_breakers.BUCKET,
    job_store.REQUESTS_BUCKET,
    job_store.JOBS_BUCKET,
    keys.KEYS_BUCKET,
    nodes.INVITES_BUCKET,
    nodes.NODES_BUCKET,
    nodes.USED_TOKENS_BUCKET,
    prefetch.BUCKET,
    quotas.BUCKET,
    sealing.BUCKET,
    webhooks.BUCKET,
    worker_registry.BUCKET,
)
# Those that no part follows: read once at the start, so that damaged records are known.
UNFOLLOWED: Mapping[str, Codec[Any]] = {
    nodes.INVITES_BUCKET: nodes.INVITES,
    nodes.USED_TOKENS_BUCKET: nodes.USED_TOKENS,
    dead_letters.BUCKET: dead_letters.LETTERS,
    job_store.REQUESTS_BUCKET: job_store.REQUESTS,
    sealing.BUCKET: sealing.VAULTS,
    audit_log.BUCKET: audit_log.ENTRIES,
    audit_log.CHAINS_BUCKET: audit_log.CHAINS,
}
BLOB_SWEEP_INTERVAL_S = 3_600.0
SEAL_SWEEP_INTERVAL_S = 600.0
DELETION_INTERVAL_S = 2.0


class Gateway:
    """`run` it in a task group; it is ready once it has read its store, and stops after `drain`."""

    def __init__(
        self,
        *,
        store: RecordStore,
        blobs: BlobStore,
        clock: Clock,
        random_bytes: RandomBytes,
        settings: GatewaySettings,
        limits: GatewayLimits | None = None,
        is_shared: bool = False,
        shipped: Mapping[str, ShippedAnnotator] | None = None,
        data_keys: DataKeys | None = None,
        thumbnail: StageRequest | None = None,
    ) -> None:
        """`is_shared`: other gateways work over the same store. `thumbnail`: how generated images are compared.

        `data_keys`: those that seal the stores, if any.

        `shipped`: the annotators that mean the same whatever workers say; None for those that Fanlight ships.
        """
        limits = limits or GatewayLimits()
        records = self.records = Records(store, clock)
        if shipped is None:
            shipped = shipped_annotators()
        core = core_of(records, blobs, clock, random_bytes, settings, limits, is_shared=is_shared, shipped=shipped)
        self._core, self._is_shared = core, is_shared
        self._job_store, self._leases = core.job_store, core.leases
        self._cache = ControlImageCache(
            records, blobs, clock, limit=limits.cache_limit, budget_bytes=settings.cache_budget_bytes
        )
        requests = IdempotencyKeys(records)
        images = SourceImages(blobs, limit_bytes=settings.image_limit_bytes)
        self.probe = StoreProbe(records, clock, blobs)
        self.workers = core.workers
        self.audit = core.audit
        self.nodes = Nodes(records, clock, random_bytes, core.audit, credential_ttl_s=settings.credential_lifetime_s)
        self.keys = Keys(records, clock, random_bytes, core.audit)
        self.quotas = core.quotas
        self.keys.close_for(self.quotas.is_closed)
        core.webhooks.close_for(self.quotas.is_closed)
        self.sealing = Sealing(data_keys, records, blobs)
        self.dead_letters = DeadLetters(records, core.audit)
        self.redrives = Redrives(core, self.dead_letters)
        self.explanations = Explainer(core)
        self._prefetches = PrefetchClaims(records, core.scheduler, clock)
        self.moderation = Moderation(core, random_bytes, is_shared=is_shared)
        planner = JobPlanner(images, self._cache, core.workers, random_bytes)
        self.jobs = Jobs(core, requests, planner, self.moderation)
        self.deletions = Deletions(core, self.jobs, requests, self._cache, self.dead_letters, core.audit)
        self.tenant_deletions = TenantDeletions(
            records,
            blobs,
            core.job_store,
            self.keys,
            self.quotas,
            self.sealing,
            self.deletions,
            core.audit,
            clock,
            is_shared=is_shared,
            is_creating=self.jobs.is_creating,
        )
        judge = Judge(note_checked=self._note_checked, leave_out=self._leave_out)
        checks: dict[str, TaskChecks] = {
            PREPROCESS: ResultChecks(core, judge),
            DIFFUSION: ImageChecks(core, judge, thumbnail),
        }
        self.queue = Completion(core, self._cache, self.dead_letters, checks, self.moderation.hurry)
        self.polls = Polls(core, self.queue)
        self._retention = JobRetention(core.job_store, requests, core.webhooks, clock, core.quotas)
        self._blob_retention = BlobRetention(core.job_store, blobs, clock, settings, core.quotas)
        self._clock_watch = ClockWatch(clock)
        self._stopping = asyncio.Event()
        self._dead: list[Job] = []
        core.job_store.observe(self._note_dead)

    def use_webhooks(self, options: WebhookOptions) -> None:
        """Deliver webhooks from now on; before `run`."""
        self._core.webhooks.use(options)

    @property
    def ready(self) -> bool:
        """It has read its store and is not draining."""
        return self._job_store.caught_up.is_set() and not self._stopping.is_set()

    def drain(self) -> None:
        """End long polls, waits and watches, and begin no new ones."""
        self._stopping.set()
        self.polls.drain()
        self.jobs.drain()
        self.audit.drain()

    async def load(self) -> None:
        """Read what the store has besides jobs; retries until the store answers. Before `run`.

        OtherFormatVersion for a store that an older or a newer Fanlight wrote.
        """
        while True:
            try:
                await refuse_other_format(self.records, BUCKETS)
                await self.nodes.load()
                await self.keys.load()
                await self.quotas.load()
                return await self.workers.load()
            except Unavailable as error:
                log.info("store_not_ready", message=error.message)
                await asyncio.sleep(error.retry_after_s or 1.0)

    async def wait_until_ready(self) -> None:
        await self._job_store.caught_up.wait()

    async def run(self) -> None:
        """Ends after `drain`."""
        async with asyncio.TaskGroup() as group:
            following = [group.create_task(each) for each in self._followed()]
            following.append(group.create_task(self.records.scan(UNFOLLOWED)))
            group.create_task(self._every(SWEEP_INTERVAL_S, self.sweep))
            group.create_task(self._every(PROBE_INTERVAL_S, self._probe))
            group.create_task(self._every(BLOB_SWEEP_INTERVAL_S, self._sweep_blobs))
            group.create_task(self._every(DELETION_INTERVAL_S, self.tenant_deletions.run))
            group.create_task(self._every(SEAL_SWEEP_INTERVAL_S, self.sealing.sweep))
            group.create_task(self._expire())
            group.create_task(self._every(WEBHOOK_INTERVAL_S, lambda: self._core.webhooks.run(group)))
            if self._is_shared:
                group.create_task(self._every(self._core.heartbeats.interval_s, self._core.heartbeats.beat))
            await self._stopping.wait()
            for follow in following:
                follow.cancel()

    def _followed(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Verdicts, and watches over the store, by which this gateway learns of the others' changes."""
        core = self._core
        ours = [core.job_store.follow(), core.circuit_breakers.follow(), core.webhooks.follow(), self._cache.follow()]
        ours += [self.moderation.run(), self.nodes.follow(), self.keys.follow(), self.quotas.follow()]
        ours.append(self.audit.follow())
        return [*ours, core.workers.follow(), core.heartbeats.follow()] if self._is_shared else ours

    async def sweep(self) -> None:
        """Delete what is old, and write the dead letters that an earlier process could not."""
        if self._clock_watch.is_settled():
            await self._retention.sweep()
            await self.workers.sweep()
            await self.nodes.sweep()
            await self.keys.sweep()
            await self.tenant_deletions.sweep()
            await self.audit.sweep()
            await self._core.circuit_breakers.sweep()
            await self._core.heartbeats.sweep()
            await self._blob_retention.make_room()
        await self._prefetches.sweep()
        while self._dead:
            await self.dead_letters.keep(self._dead[-1])
            self._dead.pop()
        await self.dead_letters.sweep()
        await self.records.verify()

    async def _sweep_blobs(self) -> None:
        if self._clock_watch.is_settled():
            await self._blob_retention.sweep()

    async def purge_node(self, node_id: str) -> int:
        """Drop the cached control images that the node made; returns how many."""
        async with self.audit.change("nodes.purge", f"nodes/{node_id}", steps=True) as change:
            dropped = await self._cache.purge(node_id)
            change.detail = f"{dropped} cached control images"
        log.info("node_purged", node=node_id, dropped=dropped)
        return dropped

    async def remove_damaged(self, bucket: str, key: str) -> DamagedRecord:
        """NotFound where there is none, or where it can be read."""
        async with self.audit.change("damaged_records.remove", f"damaged-records/{bucket}/{key}"):
            return await self.records.remove_damaged(bucket, key)

    async def rotate_data_key(self, tenant: str) -> int:
        """The number of the tenant's new data key. FailedPrecondition where nothing is sealed; NotFound."""
        async with self.audit.change("data_keys.rotate", f"tenants/{tenant}", tenant=tenant, steps=True):
            return await self.sealing.rotate(tenant)

    def workers_of(self, node_id: str) -> Sequence[str]:
        """Ids of the node's live workers."""
        return [each for each in self.workers.live_ids() if node_of(each) == node_id]

    def now_s(self) -> float:
        return self._core.clock.now_s()

    def lease_rights(self, images_of: ImagesOf) -> LeaseRights:
        return LeaseRights(self._job_store, self._leases, self.nodes, images_of)

    def inline_inputs(self, images_of: ImagesOf) -> InlineInputs:
        return InlineInputs(self._core.blobs, images_of)

    def is_lease_of(self, token: str, node_id: str) -> bool:
        """Whether it is a live lease of that node; also for one that has just ended, which the caller may repeat."""
        lease = self._leases.find(token)
        return lease is None or node_of(lease.worker) == node_id

    async def revoke_node(self, node_id: str, reason: str) -> NodeRecord:
        """End its credentials and leases, and drop the cached control images that it made. NotFound."""
        node = await self.nodes.revoke(node_id, reason)
        await self._end_nodes()
        return node

    async def _note_checked(self, claim: Claim, is_false: bool) -> None:
        await self.nodes.note_checked(node_of(claim.worker), is_false=is_false)

    async def _leave_out(self, liar: Claim, task: Task, need: str, why: str) -> None:
        """Revoke a node that was proven to lie; one without a credential gets such tasks only where no other can."""
        try:
            await self.revoke_node(self.nodes.get(node_of(liar.worker)).id, why)
        except NotFound:
            key = self.workers.key_of(liar.worker, task.stage, need)
            now_s = self._core.clock.now_s()
            await self._core.circuit_breakers.note_failure(
                liar.node, key, FALSE_RESULT, lease_s=now_s, weight=FAILURES_MAX
            )
            self.workers.refresh(liar.worker)
        await self.purge_node(liar.node)

    async def _end_nodes(self) -> None:
        """Ends the leases of nodes whose rights have ended, and drops what revoked ones made."""
        for node_id in self.nodes.pop_ended():
            for lease in self._leases.of_node(node_id):
                await self.queue.expire(lease)
            if self.nodes.is_revoked(node_id):
                await self.purge_node(node_id)

    @property
    def cache_figures(self) -> CacheFigures:
        return self._cache.figures

    async def _probe(self) -> None:
        """Whoever is asked next says what is wrong; a store that notices a fault of its own logs it once."""
        with contextlib.suppress(Unavailable):
            await self.probe.read()

    def _note_dead(self, job: Job) -> None:
        """While the store is read: a task that died with the process may have no dead letter."""
        if not self._job_store.caught_up.is_set() and any(task.dead for task in job.tasks):
            self._dead.append(job)

    async def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        last_s = loop.time()

        async def expire() -> None:
            nonlocal last_s
            late_s = loop.time() - last_s - EXPIRY_INTERVAL_S
            last_s = loop.time()
            if late_s > STANDSTILL_S:
                self._leases.postpone(late_s)
            self._core.workers.retire_silent()
            self._core.queue_index.release_due()
            await self._claim_prefetches()
            await self._end_nodes()
            await self.queue.expire_due()
            await self.queue.end_late_jobs()
            await self.queue.end_unconfirmed()

        await self._every(EXPIRY_INTERVAL_S, expire)

    async def _claim_prefetches(self) -> None:
        """A gateway that shares its store with no other needs no claims in it."""
        if self._is_shared:
            await self._prefetches.claim()
        else:
            self._core.scheduler.take_claims()

    async def _every(self, interval_s: float, do: Callable[[], Awaitable[None]]) -> None:
        """Until the gateway stops. A FanlightError, such as an unavailable store, is logged; the next round retries."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._stopping.wait()
                    return
            try:
                await do()
            except FanlightError as error:
                log.warning("sweep_failed", reason=error.reason, message=error.message)
