"""What every part of the app works with, wired once. `gateway` composes the parts themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

from fanlight.contract.shipped import ShippedAnnotator
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.circuit_breakers import CircuitBreakers
from services.gateway.app.heartbeats import Heartbeats
from services.gateway.app.job_references import JobReferences
from services.gateway.app.job_store import JobStore
from services.gateway.app.leases import LeaseTable, RandomBytes
from services.gateway.app.queue_index import Deadlines, Notifier, QueueIndex
from services.gateway.app.quotas import Quotas
from services.gateway.app.records import Records
from services.gateway.app.second_opinions import SecondOpinions
from services.gateway.app.source_backoffs import SourceBackoffs
from services.gateway.app.watch import JobPublisher
from services.gateway.app.webhooks import Webhooks
from services.gateway.app.worker_registry import WorkerRegistry
from services.gateway.config import GatewayLimits, GatewaySettings
from services.gateway.domain.offers import OfferRules
from services.gateway.domain.progress import StallLimits
from services.gateway.ports import Budgeted, Clock
from services.gateway.scheduler.replication import Replication, ReplicationPolicy
from services.gateway.scheduler.schedule import Scheduler
from services.kernel.blobs import BlobStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    job_store: JobStore
    references: JobReferences
    audit: AuditLog
    leases: LeaseTable
    scheduler: Scheduler
    queue_index: QueueIndex
    notifier: Notifier
    hub: JobPublisher
    circuit_breakers: CircuitBreakers
    heartbeats: Heartbeats
    deadlines: Deadlines
    opinions: SecondOpinions
    webhooks: Webhooks
    quotas: Quotas
    workers: WorkerRegistry
    blobs: BlobStore
    clock: Clock
    random_bytes: RandomBytes
    settings: GatewaySettings
    limits: GatewayLimits


def core_of(
    store: Records,
    blobs: BlobStore,
    clock: Clock,
    random_bytes: RandomBytes,
    settings: GatewaySettings,
    limits: GatewayLimits,
    *,
    is_shared: bool,
    shipped: Mapping[str, ShippedAnnotator],
) -> Core:
    """All of them observe the job store. `shipped`: the annotators that no worker can change."""
    notifier, hub, jobs = Notifier(), JobPublisher(), JobStore(store)
    stall = StallLimits(
        factor=limits.stall_factor,
        floor_s=limits.stall_floor_s,
        first_s=limits.stall_first_s,
        longest_s=limits.stall_longest_s,
    )
    leases = LeaseTable(clock, ttl_s=settings.lease_ttl_s, is_shared=is_shared, stall=stall)
    policy = ReplicationPolicy(
        day_bytes=limits.prefetch_day_bytes, speculative_share=settings.prefetch_speculative_share
    )
    scheduler = Scheduler(Replication(policy))
    sources, opinions, deadlines = SourceBackoffs(clock), SecondOpinions(clock), Deadlines(clock)
    audit = AuditLog(
        store,
        clock,
        random_bytes,
        retention_s=settings.audit_retention_s,
        retention_count=settings.audit_retention_count,
    )
    quotas = Quotas(store, clock, settings, audit)
    if isinstance(blobs, Budgeted):
        quotas.measure("blob_bytes", blobs.used_bytes_of)
    queue_index = QueueIndex(scheduler, notifier, sources, clock, quotas.share_of)
    quotas.on_grant(queue_index.grant)
    quotas.measure("waiting_tasks", queue_index.count_of)
    breakers = CircuitBreakers(store, clock)
    rules = OfferRules(shipped=shipped, others=frozenset(settings.other_annotators.replace(",", " ").split()))
    workers = WorkerRegistry(
        store, leases, breakers, sources, scheduler, clock, limits, rules, default_model=settings.default_model
    )
    webhooks = Webhooks(store, clock, random_bytes)
    quotas.measure("webhooks", webhooks.count_of)
    references = JobReferences()
    jobs.observe(references.observe)
    jobs.on_gone(references.forget)
    for part in (leases, sources, queue_index, deadlines, opinions, workers, webhooks):
        jobs.observe(part.observe)
    jobs.observe(lambda job: hub.publish(job.id, job))
    return Core(
        job_store=jobs,
        references=references,
        audit=audit,
        leases=leases,
        scheduler=scheduler,
        queue_index=queue_index,
        notifier=notifier,
        hub=hub,
        circuit_breakers=breakers,
        heartbeats=Heartbeats(store, leases, workers),
        deadlines=deadlines,
        opinions=opinions,
        webhooks=webhooks,
        quotas=quotas,
        workers=workers,
        blobs=blobs,
        clock=clock,
        random_bytes=random_bytes,
        settings=settings,
        limits=limits,
    )
