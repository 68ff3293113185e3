"""QueueService over gRPC: translates, calls, translates."""

from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.app.gateway import Gateway
from services.gateway.rpc.jobs import Context
from services.gateway.wire import workers
from services.gateway.wire.stages import request_for


class QueueService(queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def LeaseTasks(self, request: queue_pb2.LeaseTasksRequest, context: Context) -> queue_pb2.LeaseTasksResponse:
        return workers.poll_answer(await self._gateway.polls.lease(workers.poll(request), request_for))

    async def RenewLeases(
        self, request: queue_pb2.RenewLeasesRequest, context: Context
    ) -> queue_pb2.RenewLeasesResponse:
        renewals = workers.renewals(request)
        worker = workers.worker_id(request.worker_id, field="worker_id")
        renewed = await self._gateway.queue.renew(worker, renewals)
        return workers.renewed(renewed, self._gateway.polls.new_fetches(worker))

    async def CompleteTask(
        self, request: queue_pb2.CompleteTaskRequest, context: Context
    ) -> queue_pb2.CompleteTaskResponse:
        token = workers.token(request.lease_token)
        await self._gateway.queue.complete(token, workers.made(request), workers.spans(request))
        return queue_pb2.CompleteTaskResponse()

    async def FailTask(self, request: queue_pb2.FailTaskRequest, context: Context) -> queue_pb2.FailTaskResponse:
        await self._gateway.queue.end_attempt(
            workers.token(request.lease_token), workers.fault(request), workers.failure(request)
        )
        return queue_pb2.FailTaskResponse()
