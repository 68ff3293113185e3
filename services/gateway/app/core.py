"""What every part of the app works with, made once."""

from dataclasses import dataclass

from services.gateway.app.bell import Bell
from services.gateway.app.deadlines import Deadlines
from services.gateway.app.faults import Faults
from services.gateway.app.heartbeats import Heartbeats
from services.gateway.app.hub import Hub
from services.gateway.app.leases import Leases
from services.gateway.app.ledger import Ledger
from services.gateway.app.tokens import RandomBytes
from services.gateway.app.waiting import WaitingTasks
from services.gateway.app.webhooks import Webhooks
from services.gateway.app.workers import Workers
from services.gateway.config import GatewaySettings
from services.gateway.ordering.board import Board
from services.gateway.ordering.replication import Replication, Terms
from services.gateway.ports import Clock, JobStore
from services.kernel.blobs import BlobStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    ledger: Ledger
    leases: Leases
    board: Board
    waiting: WaitingTasks
    bell: Bell
    hub: Hub
    faults: Faults
    heartbeats: Heartbeats
    deadlines: Deadlines
    webhooks: Webhooks
    workers: Workers
    blobs: BlobStore
    clock: Clock
    random_bytes: RandomBytes
    settings: GatewaySettings


def core_of(
    store: JobStore,
    blobs: BlobStore,
    clock: Clock,
    random_bytes: RandomBytes,
    settings: GatewaySettings,
    *,
    is_shared: bool,
) -> Core:
    """All of them listening to the ledger."""
    bell, hub, ledger = Bell(), Hub(), Ledger(store)
    leases = Leases(clock, ttl_s=settings.lease_ttl_s, is_shared=is_shared, stall_limit_s=settings.stall_limit_s)
    board = Board(Replication(_terms(settings)))
    waiting, deadlines, faults = WaitingTasks(board, bell, clock), Deadlines(clock), Faults(store, clock)
    workers = Workers(store, leases, faults, board, clock, settings)
    ledger.observe(leases.observe)
    ledger.observe(waiting.observe)
    ledger.observe(deadlines.observe)
    ledger.observe(workers.observe)
    webhooks = Webhooks(store, clock, random_bytes)
    ledger.observe(webhooks.observe)
    ledger.observe(lambda job: hub.tell(job.id, job))
    return Core(
        ledger=ledger,
        leases=leases,
        board=board,
        waiting=waiting,
        bell=bell,
        hub=hub,
        faults=faults,
        heartbeats=Heartbeats(store, leases, workers),
        deadlines=deadlines,
        webhooks=webhooks,
        workers=workers,
        blobs=blobs,
        clock=clock,
        random_bytes=random_bytes,
        settings=settings,
    )


def _terms(settings: GatewaySettings) -> Terms:
    return Terms(day_bytes=settings.prefetch_day_bytes, unasked_share=settings.prefetch_unasked_share)
