"""`/v1/jobs/{id}/events`: a job's states and progress as server-sent events.

A state's id is the job's revision, and a client that comes back with it goes on from there. Progress has no id.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from starlette.responses import Response, StreamingResponse

from fanlight.errors import FanlightError, InvalidField, Unavailable
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.app.hub import Progress
from services.gateway.http import documents
from services.gateway.http.json_messages import text, to_json
from services.gateway.http.options import HttpOptions
from services.gateway.http.parameters import Asking, refuse_unknown
from services.gateway.jobs.model import Job
from services.gateway.wire import answers
from services.kernel.wire_errors import to_body

MEDIA_TYPE = "text/event-stream"
RETRY_MS = 2_000
HEARTBEAT = b": alive\n\n"
REVISION_LIMIT = 1 << 64
_HEADERS = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}


class EventRoutes:
    def __init__(self, gateway: Gateway, options: HttpOptions) -> None:
        self._gateway = gateway
        self._options = options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["jobs"], dependencies=[Depends(refuse_unknown)])
        router.add_api_route("/v1/jobs/{job_id}/events", self.watch, methods=["GET"], **documents.WATCH_JOB)
        return router

    async def watch(
        self,
        job_id: str,
        caller: Asking,
        last_event_id: Annotated[str, Header(description="The last state that was seen.")] = "",
    ) -> Response:
        after_revision = _revision(last_event_id)
        job = await self._gateway.jobs.get(f"jobs/{job_id}", caller)
        if job.state.ended and job.revision <= after_revision:
            # The one answer after which an EventSource does not come back.
            return Response(status_code=204)
        events = self._gateway.jobs.watch(job.name, after_revision=after_revision, caller=caller)
        told = (self._gateway.explanations.told(each) async for each in events)
        return StreamingResponse(_stream(told, self._options.heartbeat_s), media_type=MEDIA_TYPE, headers=_HEADERS)


def _revision(text: str) -> int:
    if not text:
        return 0
    if not text.isdecimal() or int(text) >= REVISION_LIMIT:
        raise InvalidField("must be the id of a state event", field="Last-Event-ID")
    return int(text)


async def _stream(events: AsyncIterator[Job | Progress], heartbeat_s: float) -> AsyncIterator[bytes]:
    yield b"retry: %d\n\n" % RETRY_MS
    try:
        async for event in _with_silence(events, heartbeat_s):
            yield HEARTBEAT if event is None else _encoded(answers.event(event))
    except Unavailable:
        # The gateway stops; the client comes back by itself.
        return
    except FanlightError as error:
        yield b"event: error\ndata: %s\n\n" % text(to_body(error)).encode()


async def _with_silence(
    events: AsyncIterator[Job | Progress], silence_s: float
) -> AsyncIterator[Job | Progress | None]:
    """The events, and None whenever there was none for so long."""
    following: asyncio.Task[Job | Progress | None] | None = None
    try:
        while True:
            following = following or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({following}, timeout=silence_s)
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


async def _next(events: AsyncIterator[Job | Progress]) -> Job | Progress | None:
    return await anext(events, None)


def _encoded(event: gateway_pb2.JobEvent) -> bytes:
    if event.HasField("job"):
        return b"id: %d\nevent: job\ndata: %s\n\n" % (event.job.revision, text(to_json(event.job)).encode())
    return b"event: progress\ndata: %s\n\n" % text(to_json(event.progress)).encode()
