"""`/v1/jobs`: made, told, listed and cancelled."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import Response

from fanlight.common.v1 import common_pb2
from fanlight.contract.images import images_of
from fanlight.errors import InvalidField
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.callers import Caller
from services.gateway.app.filters import Only
from services.gateway.app.gateway import Gateway
from services.gateway.http import bodies, documents
from services.gateway.http.json_messages import answer, fill
from services.gateway.http.options import HttpOptions
from services.gateway.http.parameters import Asking, Wait, refuse_unknown
from services.gateway.http.uploads import keep_file
from services.gateway.jobs.model import Job
from services.gateway.wire import answers, explanations, requests, webhooks
from services.kernel.blobs import BlobStore

PART = "part:"
JOB_PART = "job"


class JobRoutes:
    def __init__(self, gateway: Gateway, blobs: BlobStore, options: HttpOptions) -> None:
        self._gateway = gateway
        self._blobs = blobs
        self._options = options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["jobs"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        add("/v1/jobs", self.create, methods=["POST"], **documents.CREATE_JOB)
        add("/v1/jobs:batch", self.create_each, methods=["POST"], **documents.CREATE_JOBS)
        add("/v1/jobs", self.list, methods=["GET"], **documents.LIST_JOBS)
        add("/v1/jobs/{job_id}:cancel", self.cancel, methods=["POST"], **documents.CANCEL_JOB)
        add("/v1/jobs/{job_id}/webhook", self.webhook, methods=["GET"], **documents.GET_WEBHOOK)
        add("/v1/jobs/{job_id}/explain", self.explain, methods=["GET"], **documents.EXPLAIN_JOB)
        add("/v1/jobs/{job_id}", self.get, methods=["GET"], **documents.GET_JOB)
        return router

    async def create(
        self,
        request: Request,
        caller: Asking,
        wait: Wait = 0.0,
        idempotency_key: Annotated[str, Header(description="The job's `request_id`, where the body has none.")] = "",
    ) -> Response:
        if bodies.content_type(request) == bodies.FORM:
            message = await self._of_form(request, caller)
        else:
            message = _parsed(await bodies.read_json(request, self._options))
        _identify(message, idempotency_key)
        job = await self._gateway.jobs.create(requests.new_job(message, self._gateway.workers), caller)
        if wait:
            job = await self._gateway.jobs.wait(job.name, wait_s=wait, caller=caller)
        return _answer(self._gateway.explanations.with_estimate(job), status=201)

    async def create_each(self, request: Request, caller: Asking) -> Response:
        message = gateway_pb2.CreateJobsRequest()
        fill(message, await bodies.read_json(request, self._options))
        news = requests.new_jobs(message, self._gateway.workers)
        made = await self._gateway.jobs.create_each(news, caller)
        return answer(answers.results(await self._gateway.explanations.all_told(made)))

    async def get(self, job_id: str, caller: Asking, wait: Wait = 0.0) -> Response:
        name = f"jobs/{job_id}"
        job = await (
            self._gateway.jobs.wait(name, wait_s=wait, caller=caller) if wait else self._gateway.jobs.get(name, caller)
        )
        return _answer(self._gateway.explanations.with_estimate(job))

    async def explain(self, job_id: str, caller: Asking) -> Response:
        job = await self._gateway.jobs.get(f"jobs/{job_id}", caller)
        return answer(explanations.explanation(self._gateway.explanations.of(job)))

    async def list(
        self,
        caller: Asking,
        page_size: Annotated[int, Query(ge=0, le=1_000, description="0 means 50.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
        state: Annotated[str, Query(description="Only jobs in this state, such as `running`.")] = "",
        model: Annotated[str, Query(description="Only jobs for this model.")] = "",
        annotator: Annotated[str, Query(description="Only annotations by this annotator.")] = "",
        tenant: Annotated[str, Query(description="Only this tenant's jobs; for operators.")] = "",
        created_from_time: Annotated[datetime | None, Query(description="Only jobs made then or later.")] = None,
        created_before_time: Annotated[datetime | None, Query(description="Only jobs made before.")] = None,
    ) -> Response:
        only = Only(
            state=requests.job_state(_state(state)) if state else None,
            model=model,
            annotator=annotator,
            tenant=tenant,
            created_from_s=_seconds(created_from_time),
            created_before_s=_seconds(created_before_time),
        )
        page = await self._gateway.jobs.list(page_size=page_size, page_token=page_token, only=only, caller=caller)
        jobs = [answers.job(job) for job in await self._gateway.explanations.all_told(page.jobs)]
        return answer(gateway_pb2.ListJobsResponse(jobs=jobs, next_page_token=page.next_token))

    async def webhook(self, job_id: str, caller: Asking) -> Response:
        return answer(webhooks.webhook(await self._gateway.jobs.webhook(f"jobs/{job_id}", caller)))

    async def cancel(self, job_id: str, caller: Asking) -> Response:
        return _answer(await self._gateway.jobs.cancel(f"jobs/{job_id}", caller))

    async def _of_form(self, request: Request, caller: Caller) -> gateway_pb2.CreateJobRequest:
        """The `job` part, its `part:NAME` images kept as blobs."""
        form = await bodies.read_form(request, self._options)
        try:
            message = _parsed(bodies.parse_json(await self._job_part(form), field=JOB_PART))
            await self._keep_parts(message, form.files, caller)
            return message
        finally:
            await form.close()

    async def _job_part(self, form: bodies.Form) -> bytes:
        if JOB_PART in form.fields:
            return form.fields[JOB_PART].encode()
        file = form.files.pop(JOB_PART, None)
        if file is None:
            raise InvalidField(
                "the form has no such part, or ends before it does; it holds the job's JSON", field=JOB_PART
            )
        return await bodies.read_file(file, limit_bytes=self._options.json_limit_bytes, field=JOB_PART)

    async def _keep_parts(
        self, message: gateway_pb2.CreateJobRequest, files: dict[str, UploadFile], caller: Caller
    ) -> None:
        wanted = {field: image for field, image in images_of(message) if image.url.startswith(PART)}
        names = {field: image.url.removeprefix(PART) for field, image in wanted.items()}
        for field, name in names.items():
            if name not in files:
                raise InvalidField(f"the form has no file named {name!r}", field=f"{field}.url")
        for name in files.keys() - names.values():
            raise InvalidField(f"no image's url is {PART}{name}", field=name)
        kept = {name: await keep_file(self._blobs, name, file, scope=caller.tenant) for name, file in files.items()}
        for field, image in wanted.items():
            info = kept[names[field]]
            image.blob.CopyFrom(common_pb2.Blob(scope=info.scope, digest=info.digest))


def _parsed(value: object) -> gateway_pb2.CreateJobRequest:
    message = gateway_pb2.CreateJobRequest()
    fill(message, value)
    return message


def _identify(message: gateway_pb2.CreateJobRequest, key: str) -> None:
    if key and message.request_id and key != message.request_id:
        raise InvalidField("differs from the job's request_id", field="Idempotency-Key")
    message.request_id = message.request_id or key


def _state(text: str) -> "gateway_pb2.Job.State.ValueType":
    name = f"STATE_{text.upper().removeprefix('STATE_')}"
    names = gateway_pb2.Job.State.keys()[1:]
    if name not in names:
        known = ", ".join(key.removeprefix("STATE_").lower() for key in names)
        raise InvalidField(f"must be one of {known}", field="state")
    return gateway_pb2.Job.State.Value(name)


def _seconds(time: datetime | None) -> float:
    """Since the epoch; a time that says no zone is UTC."""
    if time is None:
        return 0.0
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _answer(job: Job, *, status: int = 200) -> Response:
    return answer(answers.job(job), status=status, headers={"Location": f"/v1/{job.name}", "Cache-Control": "no-store"})
