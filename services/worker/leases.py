"""A worker's leases: the calls about them, when they are renewed, and the heartbeat that renews them.

Knows no stage.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import grpc.aio

from fanlight.common.v1 import common_pb2
from fanlight.errors import FanlightError
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.kernel.logs import get_logger
from services.worker.ports import DownloadStatus, Preview, StageProgress
from services.worker.prefetch import Prefetcher
from services.worker.retry import CALL_DEADLINE_S, Backoff, Env, Throttle, our_errors, race

log = get_logger()

# Leaves time for two retries before the lease ends.
RENEWALS_PER_TTL = 3
RENEW_AFTER_MIN_S = 0.05
PREVIEW_BYTES_MAX = 64 * 1024
# Short, so that there is time for a retry before a lease ends.
RENEW_DEADLINE_S = 5.0
# How long to sleep without leases; a new lease ends the sleep.
IDLE_S = 60.0
# While the gateway is away, each renewal waits for the connection by itself.
PAUSE_MAX_S = 1.0
# The same failure is logged again after this time.
SAY_AGAIN_EVERY_S = 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class WorkerLease:
    task: queue_pb2.LeasedTask
    renew_after_s: float
    renew_at_s: float
    runner: "asyncio.Task[None] | None" = None
    # The latest progress, and whether it was sent.
    progress: StageProgress | None = field(default=None, repr=False)
    is_sent: bool = True
    # The newest preview that is due and not made yet, the one that is being made, and the one to send.
    due_preview: Preview | None = field(default=None, repr=False)
    making: "asyncio.Task[None] | None" = field(default=None, repr=False)
    preview: bytes = field(default=b"", repr=False)
    # The result is being sent: its answer decides, not a renewal at the same time.
    is_settled: bool = False

    @property
    def token(self) -> bytes:
        return self.task.lease_token

    @property
    def has_news(self) -> bool:
        """Something to report."""
        return not self.is_sent or bool(self.preview)

    def drop_previews(self) -> None:
        """The work has ended: no preview of it is made any more."""
        self.due_preview, self.preview = None, b""

    def stop(self) -> None:
        if self.runner is not None:
            self.runner.cancel()


class WorkerLeases:
    """The leases that this worker holds, by token. For one event loop; calls no one."""

    def __init__(self, *, progress_every_s: float) -> None:
        self._progress_every_s = progress_every_s
        self._by_token: dict[bytes, WorkerLease] = {}
        self._sent_s = -math.inf
        # Set when `due_s` may have become earlier.
        self.changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._by_token)

    def __iter__(self) -> Iterator[WorkerLease]:
        return iter(list(self._by_token.values()))

    @property
    def tokens(self) -> list[bytes]:
        return list(self._by_token)

    def add(self, task: queue_pb2.LeasedTask, *, now_s: float) -> WorkerLease:
        after_s = _renew_after_s(task.ttl_s)
        lease = WorkerLease(task=task, renew_after_s=after_s, renew_at_s=now_s + after_s)
        self._by_token[lease.token] = lease
        self.changed.set()
        return lease

    def remove(self, lease: WorkerLease) -> None:
        if self._by_token.get(lease.token) is lease:
            del self._by_token[lease.token]

    def report(self, lease: WorkerLease, progress: StageProgress) -> None:
        """Keep the progress for the next renewal, in place of an older one; a due preview only gives way to a newer."""
        lease.progress, lease.is_sent = progress, False
        lease.due_preview = progress.preview or lease.due_preview
        self.changed.set()

    def add_preview(self, lease: WorkerLease, preview: bytes) -> None:
        """Keep a preview that was made for the next renewal."""
        if len(preview) > PREVIEW_BYTES_MAX:
            log.warning("preview_too_large", task=lease.task.name, size_bytes=len(preview))
            return
        lease.preview = preview
        self.changed.set()

    @property
    def due_s(self) -> float:
        """When to renew next; infinite without leases."""
        renew_s = min((lease.renew_at_s for lease in self._by_token.values()), default=math.inf)
        has_news = any(lease.has_news for lease in self._by_token.values())
        return min(renew_s, self._sent_s + self._progress_every_s) if has_news else renew_s

    def take_renewals(self, *, now_s: float) -> list[queue_pb2.Renewal]:
        """One renewal for each lease, with the progress and the preview that were not sent yet."""
        self._sent_s = now_s
        return [_renewal(lease) for lease in self._by_token.values()]

    def note(self, answers: list[queue_pb2.RenewedLease], *, now_s: float) -> None:
        """Apply the gateway's answer to the renewals that were sent at `now_s`."""
        for answer in answers:
            lease = self._by_token.get(answer.lease_token)
            if lease is None:
                continue
            if answer.status == queue_pb2.RenewedLease.STATUS_RENEWED:
                lease.renew_after_s = _renew_after_s(answer.ttl_s)
            elif answer.status == queue_pb2.RenewedLease.STATUS_LOST:
                self._abandon(lease, "lost")
            elif answer.status == queue_pb2.RenewedLease.STATUS_CANCELLED:
                self._abandon(lease, "cancelled")
        # Also leases that are settled or that the answer leaves out.
        for lease in self:
            lease.renew_at_s = now_s + lease.renew_after_s

    def _abandon(self, lease: WorkerLease, why: str) -> None:
        """Stop the work: its result is no longer wanted."""
        if not lease.is_settled:
            log.info("task_abandoned", task=lease.task.name, why=why)
            self.remove(lease)
            lease.stop()


def _renew_after_s(ttl_s: float) -> float:
    return max(RENEW_AFTER_MIN_S, ttl_s / RENEWALS_PER_TTL)


def _renewal(lease: WorkerLease) -> queue_pb2.Renewal:
    progress = lease.progress
    if progress is None or not lease.has_news:
        return queue_pb2.Renewal(lease_token=lease.token)
    report = queue_pb2.Progress(
        step=progress.step,
        steps=progress.steps,
        preview=lease.preview,
        fetch=_fetch(progress.fetch) if progress.fetch else None,
    )
    lease.is_sent, lease.preview = True, b""
    return queue_pb2.Renewal(lease_token=lease.token, progress=report)


def _fetch(download: DownloadStatus) -> common_pb2.FetchProgress:
    return common_pb2.FetchProgress(
        reference=download.reference,
        done_bytes=download.done_bytes,
        total_bytes=download.total_bytes,
        goodput_bps=download.bytes_per_s * 8,
        seconds_left=download.seconds_left,
        source=download.source,
    )


class QueueCalls:
    """Calls to the gateway's queue, each with a deadline. Raise FanlightError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: queue_pb2_grpc.QueueServiceAsyncStub = queue_pb2_grpc.QueueServiceStub(channel)

    async def lease(self, request: queue_pb2.LeaseTasksRequest) -> queue_pb2.LeaseTasksResponse:
        with our_errors():
            return await self._stub.LeaseTasks(request, timeout=request.wait_s + CALL_DEADLINE_S)

    async def renew(self, request: queue_pb2.RenewLeasesRequest) -> queue_pb2.RenewLeasesResponse:
        # Leases expire: this is sent the moment the connection is back, not after a pause.
        with our_errors():
            return await self._stub.RenewLeases(request, timeout=RENEW_DEADLINE_S, wait_for_ready=True)

    async def complete(self, request: queue_pb2.CompleteTaskRequest) -> None:
        with our_errors():
            await self._stub.CompleteTask(request, timeout=CALL_DEADLINE_S)

    async def fail(self, request: queue_pb2.FailTaskRequest) -> None:
        with our_errors():
            await self._stub.FailTask(request, timeout=CALL_DEADLINE_S)


class Renewer:
    """The worker's heartbeat: renews all leases in one call, with progress, and applies the answer.

    A gateway that does not answer stops no work: once it is back, it decides who has the task.
    """

    def __init__(
        self,
        queue: QueueCalls,
        leases: WorkerLeases,
        prefetcher: Prefetcher,
        env: Env,
        *,
        worker_id: Callable[[], str],
        retry_delay_max_s: float,
        make_previews: Callable[[], Awaitable[None]],
    ) -> None:
        """`make_previews`: called before each renewal, for those that it should have."""
        self._prefetcher = prefetcher
        self._queue = queue
        self._leases = leases
        self._make_previews = make_previews
        self._env = env
        self._worker_id = worker_id
        self._backoff = Backoff(env, max_s=min(PAUSE_MAX_S, retry_delay_max_s))
        self._throttle = Throttle(env, every_s=SAY_AGAIN_EVERY_S)

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await self._until_due()
            try:
                await self._renew()
            except FanlightError as error:
                pause_s = self._backoff.next_s(error)
                if self._throttle.allows(error.reason):
                    log.warning("renewal_failed", reason=error.reason, leases=len(self._leases))
                await self._env.sleep(pause_s)
            else:
                self._backoff.reset()
                self._throttle.reset()

    async def _until_due(self) -> None:
        while (wait_s := self._leases.due_s - self._env.now_s()) > 0:
            self._leases.changed.clear()
            await race(self._env.sleep(min(wait_s, IDLE_S)), self._leases.changed.wait())

    async def _renew(self) -> None:
        await self._make_previews()
        sent_s = self._env.now_s()
        renewals = self._leases.take_renewals(now_s=sent_s)
        answer = await self._queue.renew(queue_pb2.RenewLeasesRequest(worker_id=self._worker_id(), renewals=renewals))
        self._leases.note(list(answer.leases), now_s=sent_s)
        if answer.has_fetches:
            self._prefetcher.want(answer.fetches)
