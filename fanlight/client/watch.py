"""A job's events until it has ended, over as many streams as that takes; whether it ended, and why it failed."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from fanlight.client.retry import Retry, to_error
from fanlight.errors import CallFailed, JobFailed
from fanlight.gateway.v1.gateway_pb2 import GetJobRequest, Job, JobEvent, WatchJobRequest

if TYPE_CHECKING:
    from fanlight.gateway.v1.gateway_pb2_grpc import JobServiceAsyncStub


_ENDED = frozenset({Job.STATE_SUCCEEDED, Job.STATE_FAILED, Job.STATE_CANCELLED})


def has_ended(job: Job) -> bool:
    return job.state in _ENDED


def warnings_of(job: Job) -> list[str]:
    """What was done otherwise than the request may have meant: the gateway's sentences, then the nodes', each once."""
    said = [*job.warnings, *(sentence for image in job.images for sentence in image.warnings)]
    return list(dict.fromkeys(said))


def require_success(job: Job) -> None:
    """JobFailed unless the job has its images."""
    if job.state == Job.STATE_SUCCEEDED:
        return
    if job.state == Job.STATE_CANCELLED:
        raise JobFailed(f"{job.name} was cancelled", job=job.name, code="CANCELLED", reason="CANCELLED")
    failure = job.failure
    where = f"{failure.field}: " if failure.field else ""
    raise JobFailed(
        f"{job.name} failed: {where}{failure.message or 'no reason was given'}",
        job=job.name,
        code="FAILED_PRECONDITION" if failure.field else "INTERNAL",
        reason=failure.reason,
        field=failure.field,
    )


# One stream's deadline; a longer watch continues with the next one. Keepalive notices a dead gateway much earlier.
STREAM_S = 300.0
# How long a gateway that answered before may be unreachable.
UNREACHABLE_LIMIT_S = 120.0


class JobWatch:
    """One watch of one job. A stream that breaks is resumed after the last revision that was seen."""

    def __init__(self, stub: "JobServiceAsyncStub", retry: Retry, name: str, *, after_revision: int) -> None:
        self._stub = stub
        self._retry = retry
        self._name = name
        self._revision = after_revision
        self._tries = 0
        self._answered_s = retry.clock()

    async def events(self, *, timeout_s: float) -> AsyncIterator[JobEvent]:
        """The last event has the ended job, unless the caller has that revision already.

        `timeout_s` is for the calls that read the job between two streams. CallFailed where the gateway stays away, or
        refuses.
        """
        while True:
            try:
                async for event in self._stream():
                    yield event
                    if has_ended(event.job):
                        return
                if await self._has_seen_the_end(timeout_s):
                    return
            except grpc.RpcError as rpc_error:
                self._raise_unless_transient(to_error(rpc_error))
            await self._retry.sleep(self._retry.pause_s(self._tries))
            self._tries += 1

    async def _stream(self) -> AsyncIterator[JobEvent]:
        request = WatchJobRequest(name=self._name, after_revision=self._revision)
        call = self._stub.WatchJob(request, timeout=STREAM_S)
        try:
            async for event in call:
                self._note_answer()
                self._revision = max(self._revision, event.job.revision)
                yield event
        finally:
            call.cancel()

    def _note_answer(self) -> None:
        self._retry.answered, self._tries, self._answered_s = True, 0, self._retry.clock()

    async def _has_seen_the_end(self, timeout_s: float) -> bool:
        """A stream ended without an ended job: either the job had ended before, or the gateway is shutting down."""
        request = GetJobRequest(name=self._name)
        job = await self._retry.call(lambda left_s: self._stub.GetJob(request, timeout=left_s), timeout_s=timeout_s)
        return has_ended(job) and job.revision <= self._revision

    def _raise_unless_transient(self, error: CallFailed) -> None:
        """Raises the error unless another stream may work."""
        if error.code == "DEADLINE_EXCEEDED":
            self._note_answer()
            return
        limit_s = UNREACHABLE_LIMIT_S if self._retry.answered else self._retry.connect_s
        is_gone = self._retry.clock() - self._answered_s > limit_s
        if error.code not in ("UNAVAILABLE", "CANCELLED") or is_gone:
            raise error
