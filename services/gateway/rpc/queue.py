"""QueueService over gRPC: translates, calls, translates."""

from typing import Any

import grpc.aio

from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.app.gateway import Gateway
from services.gateway.wire import tasks
from services.gateway.wire.workers import worker_id

Context = grpc.aio.ServicerContext[Any, Any]


class QueueService(queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def LeaseTasks(self, request: queue_pb2.LeaseTasksRequest, context: Context) -> queue_pb2.LeaseTasksResponse:
        return tasks.poll_answer(await self._gateway.polls.lease(tasks.poll(request)))

    async def RenewLeases(
        self, request: queue_pb2.RenewLeasesRequest, context: Context
    ) -> queue_pb2.RenewLeasesResponse:
        renewals = tasks.renewals(request)
        worker = worker_id(request.worker_id, field="worker_id")
        renewed = await self._gateway.queue.renew(worker, renewals)
        return tasks.renewed(renewed, self._gateway.polls.new_fetches(worker))

    async def CompleteTask(
        self, request: queue_pb2.CompleteTaskRequest, context: Context
    ) -> queue_pb2.CompleteTaskResponse:
        token = tasks.token(request.lease_token)
        await self._gateway.queue.complete(token, tasks.made(request), tasks.spans(request))
        return queue_pb2.CompleteTaskResponse()

    async def FailTask(self, request: queue_pb2.FailTaskRequest, context: Context) -> queue_pb2.FailTaskResponse:
        await self._gateway.queue.end_attempt(
            tasks.token(request.lease_token), tasks.fault(request), tasks.failure(request)
        )
        return queue_pb2.FailTaskResponse()
