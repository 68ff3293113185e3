"""The asyncio client: checks requests before it sends them, retries calls, uploads and downloads images as blobs."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import grpc.aio

from fanlight.blobs.v1.blobs_pb2_grpc import BlobServiceStub
from fanlight.channel import open_channel
from fanlight.client import requests
from fanlight.client.audit_log import AuditLogCalls
from fanlight.client.blobs import BlobTransfer
from fanlight.client.keys import KeyCalls
from fanlight.client.nodes import NodeCalls
from fanlight.client.requests import GenerationOptions, ImageInput, ParameterValue
from fanlight.client.retry import Answer, Retry
from fanlight.client.tenants import TenantCalls
from fanlight.client.watch import JobWatch, require_success
from fanlight.common.v1.common_pb2 import Blob, ImageSource
from fanlight.contract.images import images_of
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest, LeftOutModel, Model
from fanlight.errors import FanlightError, InvalidInput
from fanlight.gateway.v1 import gateway_pb2 as gateway
from fanlight.gateway.v1.gateway_pb2 import Job, JobEvent
from fanlight.gateway.v1.gateway_pb2_grpc import JobServiceStub
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest, Annotator
from fanlight.records.v1 import records_pb2
from fanlight.records.v1.records_pb2 import DamagedRecord
from fanlight.records.v1.records_pb2_grpc import RecordServiceStub

DEFAULT_ADDRESS = "127.0.0.1:50051"
# How long a call may take with all retries; a blob's transfer may take longer.
TIMEOUT_S = 30.0
BLOB_TIMEOUT_S = 600.0
# How long to retry a gateway that has never answered.
CONNECT_S = 5.0
# How long a cancelled wait tries to cancel the job at the gateway.
CANCEL_S = 5.0
PAGE_JOBS = 200

Listener = Callable[[JobEvent], None]


class AsyncClient:
    """Made inside the event loop that uses it, closed with `async with` or `close`. Raises fanlight.errors.

    InvalidInput at once where the address or the token is malformed, or a file cannot be read. Loopback is called in
    plain text unless `ca_file` names roots; other addresses with TLS, and the system's roots where it names none.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str = "",
        ca_file: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
        plain_text: bool = False,
        scope: str = "",
        timeout_s: float = TIMEOUT_S,
        connect_s: float = CONNECT_S,
    ) -> None:
        """`certificate`: PEM files of a chain and its key, for a gateway that asks for one.

        `plain_text`: no TLS beyond loopback, for a private network where the gateway has none. Others can read along.
        """
        self._channel = _open(address, token=token, ca_file=ca_file, certificate=certificate, plain_text=plain_text)
        self._jobs = JobServiceStub(self._channel)
        self._records = RecordServiceStub(self._channel)
        self._retry = Retry(connect_s=connect_s)
        self._blobs = BlobTransfer(BlobServiceStub(self._channel), self._retry, scope=scope)
        # For operators, and keys also for a tenant's admins.
        self.keys = KeyCalls(self._channel, self._retry, timeout_s=timeout_s)
        self.audit_log = AuditLogCalls(self._channel, self._retry, timeout_s=timeout_s)
        self.tenants = TenantCalls(self._channel, self._retry, timeout_s=timeout_s)
        self.nodes = NodeCalls(self._channel, self._retry, timeout_s=timeout_s)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self,
        prompt: str,
        *,
        on_event: Listener | None = None,
        request_id: str = "",
        priority: int = 0,
        **options: Unpack[GenerationOptions],
    ) -> Job:
        """Generates, waits, and returns the job with its images. Cancelling the wait cancels the job.

        InvalidField, NotFound or TooLarge where the request is wrong, before anything is sent; JobFailed where the job
        fails or is cancelled.
        """
        request = await asyncio.to_thread(requests.generation, prompt, **options)
        job = await self.create_job(request, request_id=request_id, priority=priority)
        return await self._finished(job, on_event)

    async def annotate(
        self,
        annotator: str,
        image: ImageInput,
        *,
        parameters: Mapping[str, ParameterValue] | None = None,
        width_px: int = 0,
        height_px: int = 0,
        on_event: Listener | None = None,
        request_id: str = "",
        priority: int = 0,
    ) -> Job:
        """Makes a control image, waits, and returns the job with it as its one image. JobFailed as `generate`."""
        size = {"width_px": width_px, "height_px": height_px}
        request = await asyncio.to_thread(requests.annotation, annotator, image, parameters=parameters, **size)
        job = await self.create_job(request, request_id=request_id, priority=priority)
        return await self._finished(job, on_event)

    async def _finished(self, job: Job, on_event: Listener | None) -> Job:
        try:
            job = await self.wait_job(job, on_event=on_event)
        except asyncio.CancelledError:
            with contextlib.suppress(FanlightError):
                await self.cancel_job(job.name, timeout_s=CANCEL_S)
            raise
        require_success(job)
        return job

    async def create_job(
        self, work: GenerateRequest | AnnotateRequest, *, request_id: str = "", priority: int = 0
    ) -> Job:
        """Creates a job and returns at once. Images given as bytes are uploaded as blobs first.

        Repeating a request with the same `request_id` returns the original job; without one each call makes a new job,
        one only, however often it is retried. InvalidField, NotFound or TooLarge before anything is sent for what the
        gateway would refuse.
        """
        await asyncio.to_thread(requests.check, work)
        work = await self._with_blobs(work)
        request = gateway.CreateJobRequest(request_id=request_id or uuid.uuid4().hex, priority=priority)
        if isinstance(work, GenerateRequest):
            request.generation.CopyFrom(work)
        else:
            request.annotation.CopyFrom(work)
        return await self._call(lambda left_s: self._jobs.CreateJob(request, timeout=left_s))

    async def _with_blobs(self, work: GenerateRequest | AnnotateRequest) -> GenerateRequest | AnnotateRequest:
        work = type(work).FromString(work.SerializeToString())
        for _, image in images_of(work):
            if image.HasField("data"):
                image.CopyFrom(ImageSource(blob=await self.write_blob(image.data)))
        return work

    async def wait_job(self, job: Job | str, *, on_event: Listener | None = None) -> Job:
        """The job once it has ended, in whatever state; `on_event` is called with each event until then."""
        name, revision = (job, 0) if isinstance(job, str) else (job.name, job.revision)
        last: Job | None = None
        async for event in self.watch_job(name, after_revision=revision):
            last = event.job if event.HasField("job") else last
            if on_event is not None:
                on_event(event)
        return last or await self.get_job(name)

    async def watch_job(self, name: str, *, after_revision: int = 0) -> AsyncGenerator[JobEvent, None]:
        """States and progress until the job has ended; broken streams are resumed."""
        watch = JobWatch(self._jobs, self._retry, name, after_revision=after_revision)
        async for event in watch.events(timeout_s=self._timeout_s):
            yield event

    async def get_job(self, name: str) -> Job:
        return await self._call(lambda left_s: self._jobs.GetJob(gateway.GetJobRequest(name=name), timeout=left_s))

    async def list_jobs(self, *, limit: int = 50, state: "Job.State.ValueType" = Job.STATE_UNSPECIFIED) -> list[Job]:
        """The newest first, as many pages as the limit takes."""
        found: list[Job] = []
        page_token = ""
        while len(found) < limit:
            page_size = min(limit - len(found), PAGE_JOBS)
            request = gateway.ListJobsRequest(page_size=page_size, page_token=page_token, state=state)
            page = await self._list_page(request)
            found += page.jobs
            page_token = page.next_page_token
            if not page_token:
                break
        return found

    async def _list_page(self, request: gateway.ListJobsRequest) -> gateway.ListJobsResponse:
        return await self._call(lambda left_s: self._jobs.ListJobs(request, timeout=left_s))

    async def cancel_job(self, name: str, *, timeout_s: float | None = None) -> Job:
        request = gateway.CancelJobRequest(name=name)
        return await self._call(lambda left_s: self._jobs.CancelJob(request, timeout=left_s), timeout_s)

    async def delete_job(self, name: str) -> gateway.DeleteJobResponse:
        """For good, with its results; a running one is cancelled first."""
        request = gateway.DeleteJobRequest(name=name)
        return await self._call(lambda left_s: self._jobs.DeleteJob(request, timeout=left_s))

    async def explain_job(self, name: str) -> gateway.JobExplanation:
        """Why it waits: where its tasks are planned, when they should be done, and why not elsewhere."""
        request = gateway.ExplainJobRequest(name=name)
        return await self._call(lambda left_s: self._jobs.ExplainJob(request, timeout=left_s))

    async def get_webhook(self, name: str) -> gateway.Webhook:
        """A job's webhook deliveries and retries."""
        request = gateway.GetWebhookRequest(name=name)
        return await self._call(lambda left_s: self._jobs.GetWebhook(request, timeout=left_s))

    async def list_dead_letters(self, *, limit: int = 50) -> list[gateway.DeadLetter]:
        """Those of the newest jobs first, as many pages as the limit takes."""
        found: list[gateway.DeadLetter] = []
        page_token = ""
        while len(found) < limit:
            request = gateway.ListDeadLettersRequest(
                page_size=min(limit - len(found), PAGE_JOBS), page_token=page_token
            )
            page = await self._letters(request)
            found += page.letters
            page_token = page.next_page_token
            if not page_token:
                break
        return found

    async def _letters(self, request: gateway.ListDeadLettersRequest) -> gateway.ListDeadLettersResponse:
        return await self._call(lambda left_s: self._jobs.ListDeadLetters(request, timeout=left_s))

    async def get_dead_letter(self, task: str) -> gateway.DeadLetter:
        request = gateway.GetDeadLetterRequest(task=task)
        return await self._call(lambda left_s: self._jobs.GetDeadLetter(request, timeout=left_s))

    async def redrive_dead_letter(self, task: str) -> Job:
        """Retries the letter's job; finished tasks stay finished."""
        request = gateway.RedriveDeadLetterRequest(task=task)
        return await self._call(lambda left_s: self._jobs.RedriveDeadLetter(request, timeout=left_s))

    async def list_damaged_records(self, *, limit: int = 100) -> list[DamagedRecord]:
        """Records of the gateway's store that cannot be read; for the operator."""
        found: list[DamagedRecord] = []
        request = records_pb2.ListDamagedRecordsRequest(page_size=min(limit, PAGE_JOBS))
        while len(found) < limit:
            page = await self._call(lambda left_s: self._records.ListDamagedRecords(request, timeout=left_s))
            found += page.records
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        return found[:limit]

    async def get_damaged_record(self, name: str) -> DamagedRecord:
        """By `BUCKET/KEY`, with its bytes."""
        request = records_pb2.GetDamagedRecordRequest(name=name)
        return await self._call(lambda left_s: self._records.GetDamagedRecord(request, timeout=left_s))

    async def remove_damaged_record(self, name: str) -> DamagedRecord:
        """Deletes it from the store, for good."""
        request = records_pb2.RemoveDamagedRecordRequest(name=name)
        return await self._call(lambda left_s: self._records.RemoveDamagedRecord(request, timeout=left_s))

    async def list_annotators(self) -> list[Annotator]:
        request = gateway.ListAnnotatorsRequest()
        return list((await self._call(lambda left_s: self._jobs.ListAnnotators(request, timeout=left_s))).annotators)

    async def list_models(self) -> list[Model]:
        request = gateway.ListModelsRequest()
        return list((await self._call(lambda left_s: self._jobs.ListModels(request, timeout=left_s))).models)

    async def list_left_out(self) -> list[LeftOutModel]:
        """What workers found among their models and do not use, with the reasons; for the operator."""
        request = gateway.ListModelsRequest(left_out=True)
        return list((await self._call(lambda left_s: self._jobs.ListModels(request, timeout=left_s))).left_out)

    async def list_workers(self) -> list[gateway.WorkerStatus]:
        request = gateway.ListWorkersRequest()
        return list((await self._call(lambda left_s: self._jobs.ListWorkers(request, timeout=left_s))).workers)

    async def write_blob(self, data: bytes) -> Blob:
        """Uploads the bytes to the gateway; what it has already is not sent again."""
        return await self._blobs.write(data, timeout_s=BLOB_TIMEOUT_S)

    async def read_blob(self, blob: Blob | str) -> bytes:
        """The bytes of a blob or digest, checked against it."""
        return await self._blobs.read(blob, timeout_s=BLOB_TIMEOUT_S)

    async def delete_blob(self, blob: Blob | str) -> int:
        """And the cached control images made of it; how many blobs. CallFailed where an open job needs it."""
        return await self._blobs.delete(blob, timeout_s=self._timeout_s)

    async def _call(self, send: Callable[[float], Awaitable[Answer]], timeout_s: float | None = None) -> Answer:
        return await self._retry.call(send, timeout_s=timeout_s or self._timeout_s)


def _open(
    address: str, *, token: str, ca_file: Path | None, certificate: tuple[Path, Path] | None, plain_text: bool
) -> grpc.aio.Channel:
    if not (token.isascii() and token.isprintable()):
        raise InvalidInput("the token has characters that a token cannot have; it must be printable ASCII on one line")
    try:
        return open_channel(address, token=token, ca_file=ca_file, certificate=certificate, plain_text=plain_text)
    except ValueError as error:
        raise InvalidInput(f"{address}: {error}") from error
    except OSError as error:
        raise InvalidInput(f"{error.filename}: cannot be read: {error.strerror}") from error
