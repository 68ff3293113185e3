"""JobService and QueueService over gRPC: translates, calls, translates. Finds a caller of any gRPC by its token."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio

from fanlight.contract.limits import check_whole
from fanlight.errors import LeaseLost, Unauthenticated
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.app.audit_log import act_as
from services.gateway.app.gateway import Gateway
from services.gateway.app.inline_inputs import InlineInputs
from services.gateway.app.jobs import PAGE_SIZE, PAGE_SIZE_LIMIT
from services.gateway.app.peer_roles import Role, require_role
from services.gateway.app.tenants import Caller, Callers
from services.gateway.domain.keys import Right
from services.gateway.rpc.principals import Principals, require_own
from services.gateway.wire import answers, requests, workers
from services.gateway.wire.nodes import poll_of
from services.gateway.wire.stages import confirms, request_for
from services.kernel.grpc_admission import address_of_peer, bearer_of

Context = grpc.aio.ServicerContext[Any, Any]


def caller_of(callers: Callers, context: Context, right: Right) -> Caller:
    """Unauthenticated for a token that only other services accept; the kernel's guard has refused unknown tokens.

    PermissionDenied for a worker's certificate, and for a caller without the right.
    """
    roles = (Role.OPERATOR,) if right is Right.OPERATE else (Role.CLIENT, Role.OPERATOR)
    require_role(context.auth_context(), *roles)
    sent = dict(context.invocation_metadata() or ()).get("authorization", "")
    caller = callers.of_authorization(sent if isinstance(sent, str) else "")
    if caller is None:
        raise Unauthenticated("send the right token as `authorization: bearer TOKEN`")
    caller.require(right)
    act_as(caller, address_of_peer(context.peer()))
    return caller


class JobService(gateway_pb2_grpc.JobServiceServicer):
    def __init__(self, gateway: Gateway, callers: Callers) -> None:
        self._gateway = gateway
        self._callers = callers

    def _caller(self, context: Context, right: Right) -> Caller:
        return caller_of(self._callers, context, right)

    async def CreateJob(self, request: gateway_pb2.CreateJobRequest, context: Context) -> gateway_pb2.Job:
        caller = self._caller(context, Right.SUBMIT)
        job = await self._gateway.jobs.create(requests.new_job(request, self._gateway.workers.offers), caller)
        return answers.job(self._gateway.explanations.with_estimate(job))

    async def CreateJobs(
        self, request: gateway_pb2.CreateJobsRequest, context: Context
    ) -> gateway_pb2.CreateJobsResponse:
        caller = self._caller(context, Right.SUBMIT)
        made = await self._gateway.jobs.create_each(requests.new_jobs(request, self._gateway.workers.offers), caller)
        return answers.results(await self._gateway.explanations.with_estimates(made))

    async def GetJob(self, request: gateway_pb2.GetJobRequest, context: Context) -> gateway_pb2.Job:
        job = await self._gateway.jobs.get(request.name, self._caller(context, Right.READ))
        return answers.job(self._gateway.explanations.with_estimate(job))

    async def ExplainJob(self, request: gateway_pb2.ExplainJobRequest, context: Context) -> gateway_pb2.JobExplanation:
        job = await self._gateway.jobs.get(request.name, self._caller(context, Right.READ))
        return answers.explanation(self._gateway.explanations.of(job))

    async def ListJobs(self, request: gateway_pb2.ListJobsRequest, context: Context) -> gateway_pb2.ListJobsResponse:
        page = await self._gateway.jobs.list(
            page_size=check_whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size"),
            page_token=request.page_token,
            only=requests.only(request),
            caller=self._caller(context, Right.READ),
        )
        jobs = [answers.job(job) for job in await self._gateway.explanations.with_estimates(page.jobs)]
        return gateway_pb2.ListJobsResponse(jobs=jobs, next_page_token=page.next_token)

    async def CancelJob(self, request: gateway_pb2.CancelJobRequest, context: Context) -> gateway_pb2.Job:
        return answers.job(await self._gateway.jobs.cancel(request.name, self._caller(context, Right.SUBMIT)))

    async def DeleteJob(self, request: gateway_pb2.DeleteJobRequest, context: Context) -> gateway_pb2.DeleteJobResponse:
        caller = self._caller(context, Right.SUBMIT)
        return answers.deleted_job(await self._gateway.deletions.delete_job(request.name, caller))

    async def WatchJob(
        self, request: gateway_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[gateway_pb2.JobEvent]:
        caller = self._caller(context, Right.READ)
        watch = self._gateway.jobs.watch(request.name, after_revision=request.after_revision, caller=caller)
        async with contextlib.aclosing(watch) as events:  # type: ignore[type-var]
            async for news in events:
                # Perhaps revoked meanwhile.
                self._caller(context, Right.READ)
                yield answers.event(self._gateway.explanations.with_estimate(news))

    async def GetWebhook(self, request: gateway_pb2.GetWebhookRequest, context: Context) -> gateway_pb2.Webhook:
        return answers.webhook(await self._gateway.jobs.webhook(request.name, self._caller(context, Right.READ)))

    async def ListDeadLetters(
        self, request: gateway_pb2.ListDeadLettersRequest, context: Context
    ) -> gateway_pb2.ListDeadLettersResponse:
        size = check_whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size") or PAGE_SIZE
        caller = self._caller(context, Right.READ)
        letters = await self._gateway.dead_letters.page(before=request.page_token, limit=size, caller=caller)
        return answers.dead_letters(letters, size)

    async def GetDeadLetter(
        self, request: gateway_pb2.GetDeadLetterRequest, context: Context
    ) -> gateway_pb2.DeadLetter:
        return answers.dead_letter(
            await self._gateway.dead_letters.get(request.task, self._caller(context, Right.READ))
        )

    async def RedriveDeadLetter(
        self, request: gateway_pb2.RedriveDeadLetterRequest, context: Context
    ) -> gateway_pb2.Job:
        job = await self._gateway.redrives.redrive(request.task, self._caller(context, Right.SUBMIT))
        return answers.job(self._gateway.explanations.with_estimate(job))

    async def ListAnnotators(
        self, request: gateway_pb2.ListAnnotatorsRequest, context: Context
    ) -> gateway_pb2.ListAnnotatorsResponse:
        self._caller(context, Right.READ)
        return answers.annotators(self._gateway.workers.offers)

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: Context
    ) -> gateway_pb2.ListModelsResponse:
        caller = self._caller(context, Right.READ)
        if request.left_out:
            caller.require(Right.OPERATE)
        return answers.models(self._gateway.workers.offers, left_out=request.left_out)

    async def ListWorkers(
        self, request: gateway_pb2.ListWorkersRequest, context: Context
    ) -> gateway_pb2.ListWorkersResponse:
        caller = self._caller(context, Right.READ)
        statuses = [caller.without_secrets(each) for each in self._gateway.workers.statuses()]
        return gateway_pb2.ListWorkersResponse(workers=[answers.worker_status(each) for each in statuses])


class QueueService(queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, gateway: Gateway, principals: Principals, inline: InlineInputs) -> None:
        self._gateway = gateway
        self._principals = principals
        self._inline = inline

    async def LeaseTasks(self, request: queue_pb2.LeaseTasksRequest, context: Context) -> queue_pb2.LeaseTasksResponse:
        principal = self._principals.worker(context)
        require_own(principal, request.worker.id, request.worker.stage, field="worker.id")
        if principal.node_id:
            await self._gateway.nodes.note_use(bearer_of(context))
        poll = poll_of(principal, workers.poll(request))
        leased = await self._gateway.polls.lease(poll, request_for)
        tasks = await self._inline.with_images(leased.tasks, bytes_max=request.inline_bytes_max)
        return workers.poll_answer(replace(leased, tasks=tasks), output_bytes_max=self._inline.output_bytes_max)

    async def RenewLeases(
        self, request: queue_pb2.RenewLeasesRequest, context: Context
    ) -> queue_pb2.RenewLeasesResponse:
        renewals = workers.renewals(request)
        worker = workers.worker_id(request.worker_id, field="worker_id")
        require_own(self._principals.worker(context), worker, "", field="worker_id")
        renewed = await self._gateway.queue.renew(worker, renewals)
        return workers.renewed(renewed, self._gateway.polls.new_fetches(worker))

    async def CompleteTask(
        self, request: queue_pb2.CompleteTaskRequest, context: Context
    ) -> queue_pb2.CompleteTaskResponse:
        token = workers.token(request.lease_token)
        self._require_lease(context, token)
        await self._gateway.queue.complete(token, workers.made(request), workers.spans(request))
        return queue_pb2.CompleteTaskResponse()

    def _require_lease(self, context: Context, token: str) -> None:
        """LeaseLost where the lease is another node's: a token that leaked is worth nothing elsewhere."""
        principal = self._principals.worker(context)
        if principal.node_id and not self._gateway.is_lease_of(token, principal.node_id):
            raise LeaseLost("the lease is not this node's; drop the work")

    async def FailTask(self, request: queue_pb2.FailTaskRequest, context: Context) -> queue_pb2.FailTaskResponse:
        self._require_lease(context, workers.token(request.lease_token))
        await self._gateway.queue.end_attempt(
            workers.token(request.lease_token), workers.fault(request), workers.failure(request), confirms
        )
        return queue_pb2.FailTaskResponse()
