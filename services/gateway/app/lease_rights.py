"""What a node may read and write: the images of its live leases, and in their scopes. Nothing beyond a lease."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fanlight.errors import LeaseLost
from services.gateway.app.job_store import JobStore
from services.gateway.app.leases import LeaseTable, LiveLease
from services.gateway.app.nodes import Nodes
from services.gateway.app.records import UnreadableRecord
from services.gateway.domain.job import Job, Task
from services.gateway.domain.nodes import Grant, node_of

# Of how many leases the images are remembered.
CACHE_LIMIT = 4_096

BlobKey = tuple[str, str]
# The blobs, by scope and digest, that a task's message names.
ImagesOf = Callable[[Job, Task], Iterable[BlobKey]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPrincipal:
    """Whose call it is: a node's, or that of this machine's workers, which share one token or need none."""

    # Empty for this machine's own workers.
    node_id: str = ""
    grant: Grant = field(default_factory=Grant)
    draining: bool = False


LOCAL = WorkerPrincipal(grant=Grant(pool="local"))


class LeaseRights:
    def __init__(self, jobs: JobStore, leases: LeaseTable, nodes: Nodes, images_of: ImagesOf) -> None:
        self._jobs, self._leases, self._nodes = jobs, leases, nodes
        self._images_of = images_of
        # A lease's images never change.
        self._cached: dict[str, frozenset[BlobKey]] = {}

    def require_read(self, principal: WorkerPrincipal, scope: str, digest: str) -> None:
        """LeaseLost unless a live lease of the principal takes the blob as an input."""
        if not any((scope, digest) in self._images(lease) for lease in self._held(principal)):
            raise LeaseLost("no live lease of this node reads that blob; drop the work")

    def require_write(self, principal: WorkerPrincipal, scope: str) -> None:
        """LeaseLost unless a live lease of the principal is for that scope."""
        if not any(self._scope(lease) == scope for lease in self._held(principal)):
            raise LeaseLost("no live lease of this node writes in that scope; drop the work")

    def _held(self, principal: WorkerPrincipal) -> list[LiveLease]:
        if principal.node_id:
            return self._leases.of_node(principal.node_id)
        return [lease for lease in self._leases.all() if not self._nodes.is_known(node_of(lease.worker))]

    def _scope(self, lease: LiveLease) -> str:
        job = self._jobs.open_job(lease.key[0])
        return job.tenant if job is not None else ""

    def _images(self, lease: LiveLease) -> frozenset[BlobKey]:
        found = self._cached.get(lease.token)
        if found is None:
            while len(self._cached) >= CACHE_LIMIT:
                del self._cached[next(iter(self._cached))]
            found = self._cached[lease.token] = self._read(lease)
        return found

    def _read(self, lease: LiveLease) -> frozenset[BlobKey]:
        job = self._jobs.open_job(lease.key[0])
        task = job.task(lease.key[1]) if job is not None else None
        if job is None or task is None:
            return frozenset()
        try:
            return frozenset(self._images_of(job, task))
        except UnreadableRecord:
            return frozenset()
