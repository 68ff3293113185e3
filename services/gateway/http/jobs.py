"""`/v1/jobs`: create, show, list and cancel jobs, and watch one as server-sent events.

A state event's id is the job's revision; a client that reconnects with it continues from there. TaskProgress has no id.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import Response, StreamingResponse

from fanlight.common.v1 import common_pb2
from fanlight.contract.images import images_of
from fanlight.errors import FanlightError, InvalidField, Unavailable
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.app.jobs import PAGE_SIZE, PAGE_SIZE_LIMIT, JobFilter
from services.gateway.app.tenants import Caller
from services.gateway.app.watch import TaskProgress
from services.gateway.domain.job import Job
from services.gateway.http import bodies, docs
from services.gateway.http.bodies import JOB_PART, HttpOptions, Reader, Submitter, Wait, refuse_unknown, store_file
from services.gateway.http.json_messages import answer, fill, text, to_json
from services.gateway.wire import answers, requests
from services.kernel.blobs import BlobStore
from services.kernel.errors_wire import to_body

EVENTS_MEDIA_TYPE = "text/event-stream"
RETRY_MS = 2_000
HEARTBEAT = b": alive\n\n"
REVISION_LIMIT = 1 << 64
_EVENTS_HEADERS = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}

PART = "part:"


class JobRoutes:
    def __init__(self, gateway: Gateway, blobs: BlobStore, options: HttpOptions) -> None:
        self._gateway = gateway
        self._blobs = blobs
        self._options = options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["jobs"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        add("/v1/jobs", self.create, methods=["POST"], **docs.CREATE_JOB)
        add("/v1/jobs:batch", self.create_each, methods=["POST"], **docs.CREATE_JOBS)
        add("/v1/jobs", self.list, methods=["GET"], **docs.LIST_JOBS)
        add("/v1/jobs/{job_id}:cancel", self.cancel, methods=["POST"], **docs.CANCEL_JOB)
        add("/v1/jobs/{job_id}/webhook", self.webhook, methods=["GET"], **docs.GET_WEBHOOK)
        add("/v1/jobs/{job_id}/explain", self.explain, methods=["GET"], **docs.EXPLAIN_JOB)
        add("/v1/jobs/{job_id}", self.get, methods=["GET"], **docs.GET_JOB)
        add("/v1/jobs/{job_id}", self.delete, methods=["DELETE"], **docs.DELETE_JOB)
        return router

    async def create(
        self,
        request: Request,
        caller: Submitter,
        wait: Wait = 0.0,
        idempotency_key: Annotated[str, Header(description="The job's `request_id`, if the body has none.")] = "",
    ) -> Response:
        if bodies.content_type(request) == bodies.FORM:
            with self._gateway.quotas.upload(caller, bodies.announced_bytes(request)):
                message = await self._of_form(request, caller)
        else:
            message = _parsed(await bodies.read_json(request, self._options))
        _identify(message, idempotency_key)
        job = await self._gateway.jobs.create(requests.new_job(message, self._gateway.workers.offers), caller)
        if wait:
            job = await self._gateway.jobs.wait(job.name, wait_s=wait, caller=caller)
        return _answer(self._gateway.explanations.with_estimate(job), status=201)

    async def create_each(self, request: Request, caller: Submitter) -> Response:
        asked = _batch(await bodies.read_json(request, self._options))
        news = requests.new_or_refused(asked, self._gateway.workers.offers)
        made = await self._gateway.jobs.create_each(news, caller)
        return answer(answers.results(await self._gateway.explanations.with_estimates(made)))

    async def get(self, job_id: str, caller: Reader, wait: Wait = 0.0) -> Response:
        name = f"jobs/{job_id}"
        job = await (
            self._gateway.jobs.wait(name, wait_s=wait, caller=caller) if wait else self._gateway.jobs.get(name, caller)
        )
        return _answer(self._gateway.explanations.with_estimate(job))

    async def explain(self, job_id: str, caller: Reader) -> Response:
        job = await self._gateway.jobs.get(f"jobs/{job_id}", caller)
        return answer(answers.explanation(self._gateway.explanations.of(job)))

    async def list(
        self,
        caller: Reader,
        page_size: Annotated[int, Query(ge=0, le=PAGE_SIZE_LIMIT, description=f"0 means {PAGE_SIZE}.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
        state: Annotated[str, Query(description="List jobs in this state, such as `running`.")] = "",
        model: Annotated[str, Query(description="List jobs for this model.")] = "",
        annotator: Annotated[str, Query(description="List annotations by this annotator.")] = "",
        tenant: Annotated[str, Query(description="List this tenant's jobs; for operators.")] = "",
        created_from_time: Annotated[datetime | None, Query(description="List jobs created then or later.")] = None,
        created_before_time: Annotated[datetime | None, Query(description="List jobs created before.")] = None,
    ) -> Response:
        only = JobFilter(
            state=requests.job_state(_state(state)) if state else None,
            model=model,
            annotator=annotator,
            tenant=tenant,
            created_from_s=_seconds(created_from_time),
            created_before_s=_seconds(created_before_time),
        )
        page = await self._gateway.jobs.list(page_size=page_size, page_token=page_token, only=only, caller=caller)
        jobs = [answers.job(job) for job in await self._gateway.explanations.with_estimates(page.jobs)]
        return answer(gateway_pb2.ListJobsResponse(jobs=jobs, next_page_token=page.next_token))

    async def webhook(self, job_id: str, caller: Reader) -> Response:
        return answer(answers.webhook(await self._gateway.jobs.webhook(f"jobs/{job_id}", caller)))

    async def cancel(self, job_id: str, caller: Submitter) -> Response:
        return _answer(await self._gateway.jobs.cancel(f"jobs/{job_id}", caller))

    async def delete(self, job_id: str, caller: Submitter) -> Response:
        return answer(answers.deleted_job(await self._gateway.deletions.delete_job(f"jobs/{job_id}", caller)))

    async def _of_form(self, request: Request, caller: Caller) -> gateway_pb2.CreateJobRequest:
        """The `job` part, its `part:NAME` images stored as blobs."""
        form = await bodies.read_form(request, self._options)
        try:
            message = _parsed(bodies.parse_json(await self._job_part(form), field=JOB_PART))
            await self._store_parts(message, form, caller)
            return message
        finally:
            await form.close()

    async def _job_part(self, form: bodies.Form) -> bytes:
        if JOB_PART in form.fields:
            return form.fields[JOB_PART].encode()
        file = form.files.pop(JOB_PART, None)
        if file is None:
            raise InvalidField(
                "the form has no such part, or ends before it; it contains the job's JSON", field=JOB_PART
            )
        return await bodies.read_file(file, limit_bytes=self._options.json_limit_bytes, field=JOB_PART)

    async def _store_parts(self, message: gateway_pb2.CreateJobRequest, form: bodies.Form, caller: Caller) -> None:
        images = {field: image for field, image in images_of(message) if image.url.startswith(PART)}
        names = {field: image.url.removeprefix(PART) for field, image in images.items()}
        files: dict[str, UploadFile] = {}
        for field, name in names.items():
            file = form.file(name)
            if file is None:
                raise InvalidField(f"the form has no file named {name!r}", field=f"{field}.url")
            files[name] = file
        for name in form.files.keys() - files.keys():
            raise InvalidField(f"no image's url is {PART}{name}", field=name)
        stored = {name: await store_file(self._blobs, name, file, scope=caller.tenant) for name, file in files.items()}
        for field, image in images.items():
            info = stored[names[field]]
            image.blob.CopyFrom(common_pb2.Blob(scope=info.scope, digest=info.digest))


def _batch(value: object) -> list[gateway_pb2.CreateJobRequest | FanlightError]:
    """Each request of a batch, or its error, whose field is the request's. InvalidField for what is no batch."""
    entries: list[object] = []
    if isinstance(value, Mapping) and isinstance(value.get("requests"), list):
        entries = value["requests"]
        value = {**value, "requests": []}
    # Refuses what is not a list, and other fields.
    fill(gateway_pb2.CreateJobsRequest(), value)
    requests.check_batch(len(entries))
    return [_parsed_or_refused(each, f"requests[{index}]") for index, each in enumerate(entries)]


def _parsed_or_refused(value: object, where: str) -> gateway_pb2.CreateJobRequest | FanlightError:
    if not isinstance(value, Mapping):
        return InvalidField("must be an object", field=where)
    try:
        return _parsed(value)
    except FanlightError as error:
        return error


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
    """Since the epoch; a time without a zone is UTC."""
    if time is None:
        return 0.0
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _answer(job: Job, *, status: int = 200) -> Response:
    return answer(answers.job(job), status=status, headers={"Location": f"/v1/{job.name}", "Cache-Control": "no-store"})


class EventRoutes:
    def __init__(self, gateway: Gateway, options: HttpOptions) -> None:
        self._gateway = gateway
        self._options = options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["jobs"], dependencies=[Depends(refuse_unknown)])
        router.add_api_route("/v1/jobs/{job_id}/events", self.watch, methods=["GET"], **docs.WATCH_JOB)
        return router

    async def watch(
        self,
        job_id: str,
        caller: Reader,
        request: Request,
        last_event_id: Annotated[str, Header(description="The last state event that was received.")] = "",
    ) -> Response:
        after_revision = _revision(last_event_id)
        job = await self._gateway.jobs.get(f"jobs/{job_id}", caller)
        if job.state.ended and job.revision <= after_revision:
            # The only answer after which an EventSource does not reconnect.
            return Response(status_code=204)
        if request.method == "HEAD":
            return Response(media_type=EVENTS_MEDIA_TYPE, headers=_EVENTS_HEADERS)
        events = self._gateway.jobs.watch(job.name, after_revision=after_revision, caller=caller)
        events_out = (self._gateway.explanations.with_estimate(each) async for each in events)
        return StreamingResponse(
            _stream(events_out, self._options.heartbeat_s), media_type=EVENTS_MEDIA_TYPE, headers=_EVENTS_HEADERS
        )


def _revision(text: str) -> int:
    if not text:
        return 0
    if not text.isdecimal() or int(text) >= REVISION_LIMIT:
        raise InvalidField("must be the id of a state event", field="Last-Event-ID")
    return int(text)


async def _stream(events: AsyncIterator[Job | TaskProgress], heartbeat_s: float) -> AsyncIterator[bytes]:
    yield b"retry: %d\n\n" % RETRY_MS
    try:
        async for event in _with_heartbeats(events, heartbeat_s):
            yield HEARTBEAT if event is None else _encoded(answers.event(event))
    except Unavailable:
        # The gateway stops; the client reconnects by itself.
        return
    except FanlightError as error:
        yield b"event: error\ndata: %s\n\n" % text(to_body(error)).encode()


async def _with_heartbeats(
    events: AsyncIterator[Job | TaskProgress], heartbeat_s: float
) -> AsyncIterator[Job | TaskProgress | None]:
    """The events, and None for a heartbeat whenever no event came for that long."""
    following: asyncio.Task[Job | TaskProgress | None] | None = None
    try:
        while True:
            following = following or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({following}, timeout=heartbeat_s)
            if not done:
                yield None
                continue
            event = following.result()
            if event is None:
                return
            following = None
            yield event
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait({following})


async def _next(events: AsyncIterator[Job | TaskProgress]) -> Job | TaskProgress | None:
    return await anext(events, None)


def _encoded(event: gateway_pb2.JobEvent) -> bytes:
    if event.HasField("job"):
        return b"id: %d\nevent: job\ndata: %s\n\n" % (event.job.revision, text(to_json(event.job)).encode())
    return b"event: progress\ndata: %s\n\n" % text(to_json(event.progress)).encode()
