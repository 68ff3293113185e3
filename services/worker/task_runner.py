"""One leased task from its request to its result. Knows no stage; its failures end here."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import structlog
from google.protobuf.message import DecodeError, Message

from fanlight.common.v1 import common_pb2
from fanlight.contract.revision import unknown_fields
from fanlight.errors import FailedPrecondition, FanlightError, LeaseLost, NodeFault
from fanlight.queue.v1 import queue_pb2
from services.kernel.logs import get_logger
from services.worker.admission import Admission, Slots
from services.worker.blob_calls import BlobCalls
from services.worker.input_pictures import InputPictures
from services.worker.leases import Lease, Leases
from services.worker.patience import Patience
from services.worker.ports import Outcome, Output, Progress, Report, Stage
from services.worker.queue_calls import QueueCalls

log = get_logger()

Fault = queue_pb2.FailTaskRequest.Fault
# The gateway may have dropped an output between its writing and the task's completion.
HAND_IN_TRIES = 2


class UnknownTask(NodeFault):
    """This worker was given a task that it does not understand; another one may."""

    reason = "UNKNOWN_TASK"


def request_of(task: queue_pb2.LeasedTask, request_type: type[Message]) -> Message:
    """The request inside the task. UnknownTask for another type, broken bytes, and fields newer than this worker's."""
    expected = request_type.DESCRIPTOR.full_name
    given = task.request.type_url.rpartition("/")[2]
    if given != expected:
        raise UnknownTask(f"this worker takes {expected}; the task has {given or 'no request'}")
    try:
        request = request_type.FromString(task.request.value)
    except DecodeError as error:
        raise UnknownTask(f"the task's {expected} cannot be read") from error
    for unknown in unknown_fields(request):
        raise UnknownTask(f"field {unknown.number} of {unknown.message_name} is newer than this worker's contract")
    return request


class TaskRunner:
    """A task that is done frees its slot while its result goes up, but at most as many as run may be going up."""

    def __init__(
        self,
        stage: Stage[Any],
        admission: Admission,
        leases: Leases,
        queue: QueueCalls,
        blobs: BlobCalls,
        pictures: InputPictures,
        patience: Patience,
    ) -> None:
        self._stage = stage
        self._admission = admission
        self._leases = leases
        self._queue = queue
        self._blobs = blobs
        self._pictures = pictures
        self._patience = patience
        self._going_up = asyncio.Semaphore(admission.slots)

    async def run(self, lease: Lease, slot: Slots) -> None:
        """Do the task and hand in what it came to. Raises nothing; cancelled, it tells the gateway nothing."""
        with structlog.contextvars.bound_contextvars(task=lease.task.name, attempt=lease.task.attempt):
            try:
                await self._do(lease, slot)
                log.info("task_completed")
            except LeaseLost:
                log.info("task_abandoned", why="lost")
            except FanlightError as error:
                fault = Fault.FAULT_REQUEST if error.is_request_fault else Fault.FAULT_NODE
                failure = common_pb2.Failure(reason=error.reason, message=error.message, field=error.field)
                await self._give_up(lease, fault, failure)
            except Exception:
                # A client never sees the text of an unknown error; the reference leads to it.
                reference = uuid.uuid4().hex[:12]
                log.exception("task_crashed", reference=reference)
                failure = common_pb2.Failure(reason="INTERNAL", message=f"internal error, reference {reference}")
                await self._give_up(lease, Fault.FAULT_NODE, failure)

    async def _do(self, lease: Lease, slot: Slots) -> None:
        async with AsyncExitStack() as until_handed_in:
            async with self._room(lease, slot):
                log.info("task_started")
                request = request_of(lease.task, self._stage.request_type)
                await self._pictures.fill(request)
                outcome = await self._stage.run(request, lease.task, self._report(lease))
                await until_handed_in.enter_async_context(self._going_up)
            await self._hand_in(lease, outcome)

    @asynccontextmanager
    async def _room(self, lease: Lease, slot: Slots) -> AsyncIterator[None]:
        """The slot; or all slots for a task that must run alone, for which it may have to wait."""
        try:
            if lease.task.alone:
                slot.release()
                async with self._admission.enter_alone():
                    yield
            else:
                yield
        finally:
            slot.release()

    def _report(self, lease: Lease) -> Report:
        loop = asyncio.get_running_loop()

        def report(progress: Progress) -> None:
            # A step may end after everything else has.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._leases.report, lease, progress)

        return report

    async def _hand_in(self, lease: Lease, outcome: Outcome) -> None:
        for _ in range(HAND_IN_TRIES):
            outputs = [await self._write(output, lease.task.scope) for output in outcome.outputs]
            spans = [common_pb2.Span(name=name, duration_s=duration_s) for name, duration_s in outcome.spans]
            request = queue_pb2.CompleteTaskRequest(lease_token=lease.token, outputs=outputs, spans=spans)
            lease.is_settled = True
            if await self._complete(request):
                return
        raise NodeFault("the gateway did not keep the outputs")

    async def _complete(self, request: queue_pb2.CompleteTaskRequest) -> bool:
        """False when an output must be written again. LeaseLost; NodeFault, for it is not the request's fault."""
        try:
            await self._patience.insist(lambda: self._queue.complete(request), doing="complete_task")
        except FailedPrecondition:
            log.warning("output_missing")
            return False
        except LeaseLost:
            raise
        except FanlightError as error:
            raise NodeFault(f"the result could not be handed in: {error.message}") from error
        return True

    async def _write(self, output: Output, scope: str) -> queue_pb2.Output:
        blob = await self._blobs.write(output.data, scope=scope)
        return queue_pb2.Output(
            blob=blob,
            seed=output.seed,
            width_px=output.width_px,
            height_px=output.height_px,
            nsfw=output.nsfw,
            provenance_json=output.provenance,
        )

    async def give_back(self, task: queue_pb2.LeasedTask) -> None:
        """Let it run elsewhere at once; counts as no failure. Tried once: else its lease runs out."""
        request = queue_pb2.FailTaskRequest(lease_token=task.lease_token, fault=Fault.FAULT_RETURNED)
        try:
            await self._queue.fail(request)
            log.info("task_returned", task=task.name)
        except FanlightError as error:
            log.warning("task_not_returned", task=task.name, reason=error.reason)

    async def _give_up(self, lease: Lease, fault: "Fault.ValueType", failure: common_pb2.Failure) -> None:
        log.warning("task_failed", reason=failure.reason, field=failure.field, fault=Fault.Name(fault))
        lease.is_settled = True
        request = queue_pb2.FailTaskRequest(lease_token=lease.token, fault=fault, failure=failure)
        try:
            await self._patience.insist(lambda: self._queue.fail(request), doing="fail_task")
        except FanlightError as error:
            log.warning("failure_not_told", reason=error.reason)
