"""JobService over gRPC: translates, calls, translates."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway.app.gateway import Gateway
from services.gateway.wire import answers, fields, requests

PAGE_SIZE_LIMIT = 1_000

Context = grpc.aio.ServicerContext[Any, Any]


class JobService(gateway_pb2_grpc.JobServiceServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def CreateJob(self, request: gateway_pb2.CreateJobRequest, context: Context) -> gateway_pb2.Job:
        new = requests.new_job(request, self._gateway.workers.catalog())
        return answers.job(await self._gateway.jobs.create(new))

    async def GetJob(self, request: gateway_pb2.GetJobRequest, context: Context) -> gateway_pb2.Job:
        return answers.job(await self._gateway.jobs.get(request.name))

    async def ListJobs(self, request: gateway_pb2.ListJobsRequest, context: Context) -> gateway_pb2.ListJobsResponse:
        page = await self._gateway.jobs.list(
            page_size=fields.whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size"),
            page_token=request.page_token,
            state=requests.job_state(request.state),
        )
        return gateway_pb2.ListJobsResponse(
            jobs=[answers.job(job) for job in page.jobs], next_page_token=page.next_token
        )

    async def CancelJob(self, request: gateway_pb2.CancelJobRequest, context: Context) -> gateway_pb2.Job:
        return answers.job(await self._gateway.jobs.cancel(request.name))

    async def WatchJob(
        self, request: gateway_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[gateway_pb2.JobEvent]:
        async for news in self._gateway.jobs.watch(request.name, after_revision=request.after_revision):
            yield answers.event(news)

    async def ListAnnotators(
        self, request: gateway_pb2.ListAnnotatorsRequest, context: Context
    ) -> gateway_pb2.ListAnnotatorsResponse:
        catalog = self._gateway.workers.catalog()
        return gateway_pb2.ListAnnotatorsResponse(
            annotators=[answers.annotator(each) for each in catalog.annotators.values()]
        )

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: Context
    ) -> gateway_pb2.ListModelsResponse:
        catalog = self._gateway.workers.catalog()
        return gateway_pb2.ListModelsResponse(models=[answers.model(each) for each in catalog.models.values()])

    async def ListWorkers(
        self, request: gateway_pb2.ListWorkersRequest, context: Context
    ) -> gateway_pb2.ListWorkersResponse:
        statuses = self._gateway.workers.statuses()
        return gateway_pb2.ListWorkersResponse(workers=[answers.worker_status(each) for each in statuses])
