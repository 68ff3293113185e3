"""`/v1/annotate/{annotator}`: an image in, its control image out, as one job that the request waits for."""

import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from fanlight.common.v1 import common_pb2
from fanlight.contract.parameters import Parameter
from fanlight.errors import Cancelled, DeadlineExceeded, InvalidField
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.domain.job import Job, JobState
from services.gateway.http import docs
from services.gateway.http.blobs import blob_answer
from services.gateway.http.bodies import HttpOptions, Submitter, Wait, announced_bytes, store_body
from services.gateway.wire import answers, requests
from services.gateway.wire.needs import find_annotator
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.errors_wire import of_reason

# Query parameters that are not the annotator's.
OWN = frozenset({"wait", "width_px", "height_px"})

_NO_TOKEN = re.compile(r"[^A-Za-z0-9_-]")

Size = Annotated[int, Query(ge=0, le=65_535, description="Both 0: the image's own size.")]


class AnnotateRoutes:
    def __init__(self, gateway: Gateway, blobs: BlobStore, options: HttpOptions) -> None:
        self._gateway = gateway
        self._blobs = blobs
        self._options = options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["annotators"])
        router.add_api_route("/v1/annotate/{annotator}", self.annotate, methods=["POST"], **docs.ANNOTATE)
        return router

    async def annotate(
        self,
        request: Request,
        caller: Submitter,
        annotator: str,
        wait: Wait = 60.0,
        width_px: Size = 0,
        height_px: Size = 0,
    ) -> Response:
        annotation = preprocessor_pb2.AnnotateRequest(annotator=annotator, width_px=width_px, height_px=height_px)
        annotation.parameters.update(self._parameters(annotator, request))
        with self._gateway.quotas.upload(caller, announced_bytes(request)):
            info = await store_body(request, self._blobs, self._options, scope=caller.tenant, settled=True)
        annotation.image.blob.CopyFrom(common_pb2.Blob(scope=info.scope, digest=info.digest))
        message = gateway_pb2.CreateJobRequest(annotation=annotation)
        new = requests.new_job(message, self._gateway.workers.offers)
        job = await self._gateway.jobs.create(new, caller, is_waited_for=True)
        job = await self._gateway.jobs.wait(job.name, wait_s=wait, caller=caller)
        # The answer names it.
        await self._gateway.jobs.keep(job)
        return self._answer(job)

    def _parameters(self, annotator: str, request: Request) -> dict[str, bool | float | str]:
        """The annotator's parameters among the query's, converted to their types. Unknown ones stay strings."""
        described = find_annotator(self._gateway.workers.offers.catalog(), annotator)
        known = {parameter.name: parameter for parameter in described.parameters} if described else {}
        values: dict[str, bool | float | str] = {}
        seen = set()
        for name, text in request.query_params.multi_items():
            if name in seen:
                raise InvalidField("is given twice", field=name if name in OWN else f"annotation.parameters.{name}")
            seen.add(name)
            if name not in OWN:
                values[name] = typed(text, known.get(name))
        return values

    def _answer(self, job: Job) -> Response:
        """The finished image, or the error why there is no image."""
        if job.failure is not None:
            raise of_reason(job.failure.reason, job.failure.message, field=job.failure.field)
        if job.state is JobState.CANCELLED:
            raise Cancelled(f"{job.name} was cancelled")
        if not job.state.ended:
            text = f"{job.name} is not done yet{_so_far(job)}; GET /v1/{job.name}?wait=60 continues to wait for it"
            raise DeadlineExceeded(text)
        message = answers.job(job)
        blob = message.images[0].blob
        info = BlobInfo(scope=blob.scope, digest=blob.digest, size_bytes=blob.size_bytes, media_type=blob.media_type)
        headers = {
            "ETag": f'"{info.digest}"',
            "Fanlight-Job": message.name,
            "Server-Timing": ", ".join(_timings(message)),
        }
        return blob_answer(self._blobs, info, headers)


def _so_far(job: Job) -> str:
    """How the last attempt failed, while the next one is awaited."""
    failures = [attempt.failure for task in job.tasks for attempt in task.attempts if attempt.failure]
    return f", because its last attempt failed: {failures[-1].message}" if failures else ""


def typed(text: str, parameter: Parameter | None) -> bool | float | str:
    """The string as the parameter's type; unchanged if it is not one, so that the check of parameters refuses it."""
    if parameter is None or isinstance(parameter.default, str):
        return text
    if isinstance(parameter.default, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        return float(text)
    except ValueError:
        return text


def _timings(job: gateway_pb2.Job) -> Iterator[str]:
    """W3C Server Timing: each span of the work in milliseconds, or a cache hit."""
    if not job.tasks:
        yield 'cache;desc="hit"'
    for task in job.tasks:
        queued_s = task.lease_time.ToNanoseconds() / 1e9 - task.queue_time.ToNanoseconds() / 1e9
        yield _timing("queue", max(0.0, queued_s))
        yield from (_timing(span.name, span.duration_s) for span in task.spans)
    total_s = job.end_time.ToNanoseconds() / 1e9 - job.create_time.ToNanoseconds() / 1e9
    yield _timing("total", max(0.0, total_s))


def _timing(name: str, duration_s: float) -> str:
    return f"{_NO_TOKEN.sub('_', name)};dur={duration_s * 1e3:.1f}"
