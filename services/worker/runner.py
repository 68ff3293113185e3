"""Runs one leased task: its request with input images filled in, its result, its failure. Knows no stage.

The one place where an unexpected error of a stage becomes a failed task.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import structlog
from google.protobuf.message import DecodeError, Message

from fanlight.common.v1 import common_pb2
from fanlight.contract.images import images_of
from fanlight.contract.limits import INLINE_BLOB_LIMIT_BYTES
from fanlight.contract.names import DEFAULT_SCOPE, digest_of
from fanlight.contract.needs import unknown_fields
from fanlight.errors import (
    FailedPrecondition,
    FanlightError,
    InvalidField,
    LeaseLost,
    NodeFault,
    ResultRefused,
    TooLarge,
)
from fanlight.queue.v1 import queue_pb2
from services.kernel.blobs import ByteLru
from services.kernel.logs import get_logger
from services.worker.admission import Admission, Slots
from services.worker.blobs import BlobCalls, blob_of
from services.worker.leases import QueueCalls, WorkerLease, WorkerLeases
from services.worker.ports import Outcome, Report, Stage, StageOutput, StageProgress
from services.worker.retry import RetryPolicy

log = get_logger()

Fault = queue_pb2.FailTaskRequest.Fault
# The gateway may have evicted an output between its upload and the task's completion.
COMPLETE_ATTEMPTS = 2

ImageKey = tuple[str, str]


class UnknownTask(NodeFault):
    """This worker does not understand the task; another worker may."""

    reason = "UNKNOWN_TASK"


class AttemptEnded(NodeFault):
    """The gateway looked at the result, refused it and ended the attempt: there is nothing left to report."""

    reason = "ATTEMPT_ENDED"


def request_of(task: queue_pb2.LeasedTask, request_type: type[Message]) -> Message:
    """The request in the task. UnknownTask for another type, broken bytes, or fields that this worker does not know."""
    expected = request_type.DESCRIPTOR.full_name
    given = task.request.type_url.rpartition("/")[2]
    if given != expected:
        raise UnknownTask(f"this worker serves {expected}; the task has {given or 'no request'}")
    try:
        request = request_type.FromString(task.request.value)
    except DecodeError as error:
        raise UnknownTask(f"the task's {expected} cannot be read") from error
    for unknown in unknown_fields(request):
        raise UnknownTask(f"field {unknown.number} of {unknown.message_name} is newer than this worker's contract")
    return request


class ReadsBlobs(Protocol):
    async def read(self, blob: common_pb2.Blob) -> bytes: ...


class InputImages:
    """The images of requests, fetched by their blobs. Caches the latest ones for the next task.

    Single flight: tasks that need the same image at the same time fetch it once.
    """

    def __init__(self, blobs: ReadsBlobs, *, cache_bytes: int) -> None:
        self._blobs = blobs
        # By scope and digest.
        self._cache: ByteLru[ImageKey, bytes] = ByteLru(limit_bytes=cache_bytes, size_of=len)
        self._fetching: WeakValueDictionary[ImageKey, asyncio.Lock] = WeakValueDictionary()

    def take(self, inputs: Sequence[queue_pb2.InlineBlob]) -> None:
        """Keep images that came with a lease. Bytes of another digest are left out, and fetched."""
        for each in inputs:
            if digest_of(each.data) == each.digest:
                self._cache.put((each.scope or DEFAULT_SCOPE, each.digest), each.data)
            else:
                log.warning("inline_input_broken", digest=each.digest)

    async def fill(self, request: Message) -> None:
        """Replace each blob with its bytes, in any message and at any depth."""
        for _, image in list(images_of(request)):
            if image.HasField("blob"):
                image.data = await self._get(image.blob)

    async def _get(self, blob: common_pb2.Blob) -> bytes:
        key = (blob.scope or DEFAULT_SCOPE, blob.digest)
        async with self._fetching.setdefault(key, asyncio.Lock()):
            data = self._cache.get(key)
            if data is None:
                data = await self._blobs.read(blob)
                self._cache.put(key, data)
            return data


class TaskRunner:
    """Runs tasks in their slots. A finished task frees its slot first, then uploads its result.

    At most as many results are uploaded at once as there are slots.
    """

    def __init__(
        self,
        stage: Stage[Any],
        admission: Admission,
        leases: WorkerLeases,
        queue: QueueCalls,
        blobs: BlobCalls,
        images: InputImages,
        retry: RetryPolicy,
    ) -> None:
        self._stage = stage
        self._admission = admission
        self._leases = leases
        self._queue = queue
        self._blobs = blobs
        self._images = images
        self._retry = retry
        self._uploads = asyncio.Semaphore(admission.slots)
        # How large an output may be that goes along with its task's completion, as the gateway said last.
        self._output_bytes_max = 0

    def note_output_bytes_max(self, bytes_max: int) -> None:
        self._output_bytes_max = min(bytes_max, INLINE_BLOB_LIMIT_BYTES)

    async def run(self, lease: WorkerLease, slot: Slots) -> None:
        """Run the task and send its result or failure. Raises nothing; after a cancellation it sends nothing."""
        with structlog.contextvars.bound_contextvars(task=lease.task.name, attempt=lease.task.attempt):
            try:
                await self._run(lease, slot)
                log.info("task_completed")
            except LeaseLost:
                log.info("task_abandoned", why="lost")
            except AttemptEnded as ended:
                log.warning("result_refused", field=ended.field, message=ended.message)
            except FanlightError as error:
                fault = Fault.FAULT_REQUEST if error.is_request_fault else Fault.FAULT_NODE
                failure = common_pb2.Failure(
                    reason=error.reason, message=error.message, field=error.field, part=error.part
                )
                await self._fail(lease, fault, failure)
            except Exception:
                # A client never sees the message of an unexpected error; the reference leads to it in the log.
                reference = uuid.uuid4().hex[:12]
                log.exception("task_crashed", reference=reference)
                failure = common_pb2.Failure(reason="INTERNAL", message=f"internal error, reference {reference}")
                await self._fail(lease, Fault.FAULT_NODE, failure)

    async def _run(self, lease: WorkerLease, slot: Slots) -> None:
        async with AsyncExitStack() as until_sent:
            async with self._slots(lease, slot):
                log.info("task_started")
                request = request_of(lease.task, self._stage.request_type)
                self._images.take(lease.task.inline_inputs)
                lease.task.ClearField("inline_inputs")
                await self._images.fill(request)
                try:
                    outcome = await self._stage.run(request, lease.task, self._report(lease))
                finally:
                    lease.drop_previews()
                await until_sent.enter_async_context(self._uploads)
            await self._send(lease, outcome)

    @asynccontextmanager
    async def _slots(self, lease: WorkerLease, slot: Slots) -> AsyncIterator[None]:
        """Hold the slot; or wait for all slots and hold them, for a task that must run alone."""
        try:
            if lease.task.alone:
                slot.release()
                async with self._admission.enter_alone():
                    yield
            else:
                yield
        finally:
            slot.release()

    def _report(self, lease: WorkerLease) -> Report:
        loop = asyncio.get_running_loop()

        def report(progress: StageProgress) -> None:
            # A step may end after the loop has stopped.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._leases.report, lease, progress)

        return report

    async def _send(self, lease: WorkerLease, outcome: Outcome) -> None:
        for attempt in range(COMPLETE_ATTEMPTS):
            # A gateway of another version, or one that evicted an output, misses its blob.
            bytes_max = 0 if attempt else self._output_bytes_max
            write = partial(self._write, scope=lease.task.scope, inline_bytes_max=bytes_max)
            outputs = [await write(output) for output in outcome.outputs]
            spans = [common_pb2.Span(name=name, duration_s=duration_s) for name, duration_s in outcome.spans]
            request = queue_pb2.CompleteTaskRequest(lease_token=lease.token, outputs=outputs, spans=spans)
            lease.is_settled = True
            if await self._complete(request):
                return
        raise NodeFault("the gateway did not store the outputs")

    async def _complete(self, request: queue_pb2.CompleteTaskRequest) -> bool:
        """False if an output must be uploaded again. Raises LeaseLost, AttemptEnded, ResultRefused, or NodeFault.

        None of them is the request's fault.
        """
        try:
            await self._retry.call(lambda: self._queue.complete(request), doing="complete_task")
        except FailedPrecondition:
            log.warning("output_missing")
            return False
        except LeaseLost:
            raise
        except ResultRefused as error:
            raise AttemptEnded(error.message, field=error.field) from error
        except (InvalidField, TooLarge) as error:
            raise ResultRefused(f"the gateway refused the result: {error.message}", field=error.field) from error
        except FanlightError as error:
            raise NodeFault(f"the result could not be sent: {error.message}") from error
        return True

    async def _write(self, output: StageOutput, *, scope: str, inline_bytes_max: int) -> queue_pb2.Output:
        """A small output goes along; the blob of any other one is written."""
        is_inline = len(output.data) <= inline_bytes_max
        blob = blob_of(output.data, scope) if is_inline else await self._blobs.write(output.data, scope=scope)
        return queue_pb2.Output(
            blob=blob,
            data=output.data if is_inline else b"",
            seed=output.seed,
            width_px=output.width_px,
            height_px=output.height_px,
            nsfw=output.nsfw,
            provenance_json=output.provenance,
            warnings=output.warnings,
        )

    async def return_task(self, task: queue_pb2.LeasedTask) -> None:
        """Return the task to the queue; not counted as a failure. Without retry: its lease would expire anyway."""
        request = queue_pb2.FailTaskRequest(lease_token=task.lease_token, fault=Fault.FAULT_RETURNED)
        try:
            await self._queue.fail(request)
            log.info("task_returned", task=task.name)
        except FanlightError as error:
            log.warning("task_not_returned", task=task.name, reason=error.reason)

    async def _fail(self, lease: WorkerLease, fault: "Fault.ValueType", failure: common_pb2.Failure) -> None:
        log.warning("task_failed", reason=failure.reason, field=failure.field, fault=Fault.Name(fault))
        lease.is_settled = True
        request = queue_pb2.FailTaskRequest(lease_token=lease.token, fault=fault, failure=failure)
        try:
            await self._retry.call(lambda: self._queue.fail(request), doing="fail_task")
        except FanlightError as error:
            log.warning("failure_not_reported", reason=error.reason)
