"""The calls to the gateway's queue: deadlines on the way there, our errors on the way back."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import grpc.aio

from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.kernel.errors_wire import from_rpc_error

CALL_DEADLINE_S = 10.0
# Short, so that there is time for another try before a lease ends.
RENEW_DEADLINE_S = 5.0


@contextmanager
def our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


class QueueCalls:
    """Each may raise FanlightError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: queue_pb2_grpc.QueueServiceAsyncStub = queue_pb2_grpc.QueueServiceStub(channel)

    async def lease(self, request: queue_pb2.LeaseTasksRequest) -> queue_pb2.LeaseTasksResponse:
        with our_errors():
            return await self._stub.LeaseTasks(request, timeout=request.wait_s + CALL_DEADLINE_S)

    async def renew(self, request: queue_pb2.RenewLeasesRequest) -> queue_pb2.RenewLeasesResponse:
        # Leases run out: this goes the moment the connection is back, and not after a pause.
        with our_errors():
            return await self._stub.RenewLeases(request, timeout=RENEW_DEADLINE_S, wait_for_ready=True)

    async def complete(self, request: queue_pb2.CompleteTaskRequest) -> None:
        with our_errors():
            await self._stub.CompleteTask(request, timeout=CALL_DEADLINE_S)

    async def fail(self, request: queue_pb2.FailTaskRequest) -> None:
        with our_errors():
            await self._stub.FailTask(request, timeout=CALL_DEADLINE_S)
