"""A job's events to its end, over as many streams as that takes."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from fanlight.client.jobs import has_ended
from fanlight.client.retry import Retry
from fanlight.client.status import to_error
from fanlight.errors import CallFailed
from fanlight.gateway.v1.gateway_pb2 import GetJobRequest, JobEvent, WatchJobRequest

if TYPE_CHECKING:
    from fanlight.gateway.v1.gateway_pb2_grpc import JobServiceAsyncStub

# One stream's deadline; a longer watch goes on with the next one. Keepalive notices a dead gateway long before.
STREAM_S = 300.0
# How long a gateway that answered before may be away.
PATIENCE_S = 120.0


class Watch:
    """One watch of one job. A stream that breaks is opened again where it broke."""

    def __init__(self, stub: "JobServiceAsyncStub", retry: Retry, name: str, *, after_revision: int) -> None:
        self._stub = stub
        self._retry = retry
        self._name = name
        self._revision = after_revision
        self._tries = 0
        self._heard_s = retry.clock()

    async def events(self, *, timeout_s: float) -> AsyncIterator[JobEvent]:
        """The last event carries the ended job, unless that was known already.

        `timeout_s` is for the calls that look after the job between two streams. CallFailed where the gateway
        stays away, or refuses.
        """
        while True:
            try:
                async for event in self._stream():
                    yield event
                    if has_ended(event.job):
                        return
                if await self._nothing_is_left(timeout_s):
                    return
            except grpc.RpcError as rpc_error:
                self._bear(to_error(rpc_error))
            await self._retry.sleep(self._retry.backoff_s(self._tries))
            self._tries += 1

    async def _stream(self) -> AsyncIterator[JobEvent]:
        request = WatchJobRequest(name=self._name, after_revision=self._revision)
        call = self._stub.WatchJob(request, timeout=STREAM_S)
        try:
            async for event in call:
                self._hear()
                self._revision = max(self._revision, event.job.revision)
                yield event
        finally:
            call.cancel()

    def _hear(self) -> None:
        self._retry.answered, self._tries, self._heard_s = True, 0, self._retry.clock()

    async def _nothing_is_left(self, timeout_s: float) -> bool:
        """A stream ended without a last word: either the job had ended before, or the gateway is going."""
        request = GetJobRequest(name=self._name)
        job = await self._retry.call(lambda left_s: self._stub.GetJob(request, timeout=left_s), timeout_s=timeout_s)
        return has_ended(job) and job.revision <= self._revision

    def _bear(self, error: CallFailed) -> None:
        """Raises the error unless another stream may do better."""
        if error.code == "DEADLINE_EXCEEDED":
            self._hear()
            return
        patience_s = PATIENCE_S if self._retry.answered else self._retry.connect_s
        is_gone = self._retry.clock() - self._heard_s > patience_s
        if error.code not in ("UNAVAILABLE", "CANCELLED") or is_gone:
            raise error
