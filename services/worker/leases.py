"""The leases that a worker holds: what to renew and when, and what to report with it. Calls nobody."""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from fanlight.common.v1 import common_pb2
from fanlight.queue.v1 import queue_pb2
from services.kernel.logs import get_logger
from services.worker.ports import Fetching, Progress

log = get_logger()

# Room for two more tries before the lease ends.
RENEWALS_PER_TTL = 3
RENEW_AFTER_MIN_S = 0.05
PREVIEW_BYTES_MAX = 64 * 1024


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    task: queue_pb2.LeasedTask
    renew_after_s: float
    renew_at_s: float
    runner: "asyncio.Task[None] | None" = None
    # The latest that was not sent yet.
    progress: Progress | None = field(default=None, repr=False)
    # The result is on its way: the answer to that decides, not a renewal that crosses it.
    is_settled: bool = False

    @property
    def token(self) -> bytes:
        return self.task.lease_token

    def stop(self) -> None:
        if self.runner is not None:
            self.runner.cancel()


class Leases:
    def __init__(self, *, progress_every_s: float) -> None:
        self._progress_every_s = progress_every_s
        self._held: dict[bytes, Lease] = {}
        self._sent_s = -math.inf
        # Set when `due_s` may have become earlier.
        self.stirred = asyncio.Event()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._held.values()))

    @property
    def tokens(self) -> list[bytes]:
        return list(self._held)

    def add(self, task: queue_pb2.LeasedTask, *, now_s: float) -> Lease:
        after_s = _renew_after_s(task.ttl_s)
        lease = Lease(task=task, renew_after_s=after_s, renew_at_s=now_s + after_s)
        self._held[lease.token] = lease
        self.stirred.set()
        return lease

    def remove(self, lease: Lease) -> None:
        if self._held.get(lease.token) is lease:
            del self._held[lease.token]

    def report(self, lease: Lease, progress: Progress) -> None:
        """Keep the progress for the next renewal, in place of an older one."""
        if len(progress.preview) > PREVIEW_BYTES_MAX:
            log.warning("preview_too_large", task=lease.task.name, size_bytes=len(progress.preview))
            progress = Progress(step=progress.step, steps=progress.steps)
        lease.progress = progress
        self.stirred.set()

    @property
    def due_s(self) -> float:
        """When to renew next; infinite while nothing is held."""
        renew_s = min((lease.renew_at_s for lease in self._held.values()), default=math.inf)
        has_news = any(lease.progress for lease in self._held.values())
        return min(renew_s, self._sent_s + self._progress_every_s) if has_news else renew_s

    def take_renewals(self, *, now_s: float) -> list[queue_pb2.Renewal]:
        """One for every lease, with the progress that was not sent yet."""
        self._sent_s = now_s
        return [_renewal(lease) for lease in self._held.values()]

    def note(self, answers: list[queue_pb2.RenewedLease], *, now_s: float) -> None:
        """What the gateway answered to renewals sent at `now_s`."""
        for answer in answers:
            lease = self._held.get(answer.lease_token)
            if lease is None:
                continue
            if answer.status == queue_pb2.RenewedLease.STATUS_RENEWED:
                lease.renew_after_s = _renew_after_s(answer.ttl_s)
            elif answer.status == queue_pb2.RenewedLease.STATUS_LOST:
                self._abandon(lease, "lost")
            elif answer.status == queue_pb2.RenewedLease.STATUS_CANCELLED:
                self._abandon(lease, "cancelled")
        # Also those that are settled, or were not answered.
        for lease in self:
            lease.renew_at_s = now_s + lease.renew_after_s

    def _abandon(self, lease: Lease, why: str) -> None:
        """Nobody wants its result any more."""
        if not lease.is_settled:
            log.info("task_abandoned", task=lease.task.name, why=why)
            self.remove(lease)
            lease.stop()


def _renew_after_s(ttl_s: float) -> float:
    return max(RENEW_AFTER_MIN_S, ttl_s / RENEWALS_PER_TTL)


def _renewal(lease: Lease) -> queue_pb2.Renewal:
    progress, lease.progress = lease.progress, None
    if progress is None:
        return queue_pb2.Renewal(lease_token=lease.token)
    news = queue_pb2.Progress(
        step=progress.step,
        steps=progress.steps,
        preview=progress.preview,
        fetch=_fetch(progress.fetch) if progress.fetch else None,
    )
    return queue_pb2.Renewal(lease_token=lease.token, progress=news)


def _fetch(fetching: Fetching) -> common_pb2.FetchProgress:
    return common_pb2.FetchProgress(
        reference=fetching.reference,
        done_bytes=fetching.done_bytes,
        total_bytes=fetching.total_bytes,
        goodput_bps=fetching.bytes_per_s * 8,
        seconds_left=fetching.seconds_left,
        source=fetching.source,
    )
