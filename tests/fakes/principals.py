"""BlobService for clients alone: no node has a lease."""

import os
from typing import Any

from services.gateway.app.job_store import JobStore
from services.gateway.app.lease_rights import LeaseRights
from services.gateway.app.leases import LeaseTable
from services.gateway.app.nodes import Nodes
from services.gateway.app.quotas import Quotas
from services.gateway.app.records import Records
from services.gateway.app.tenants import Callers
from services.gateway.config import GatewaySettings
from services.gateway.domain.progress import StallLimits
from services.gateway.rpc.blobs import BlobService
from services.gateway.rpc.principals import Principals
from services.kernel.blobs import BlobStore
from tests.fakes.audit import audit_log
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore


def clients_alone(callers: Callers) -> tuple[Principals, LeaseRights]:
    clock = FakeClock()
    store = Records(MemoryStore(), clock)
    nodes = Nodes(store, clock, os.urandom, audit_log(store, clock), credential_ttl_s=600.0)
    stall = StallLimits(factor=40.0, floor_s=120.0, first_s=1_800.0, longest_s=3_600.0)
    leases = LeaseTable(clock, ttl_s=20.0, stall=stall)
    return Principals(callers, "", nodes), LeaseRights(JobStore(store), leases, nodes, lambda job, task: ())


def blobs_of_clients(blobs: BlobStore, callers: Callers, service: type[BlobService] = BlobService) -> BlobService:
    """Without jobs, and so without deletions."""
    store, clock = Records(MemoryStore(), FakeClock()), FakeClock()
    log = audit_log(store, clock)
    quotas = Quotas(store, clock, GatewaySettings(), log)
    deletions: Any = None
    return service(blobs, *clients_alone(callers), quotas, deletions, log)
