"""A gateway for workers' tests: a real gRPC server over a scripted queue and blobs in memory.

What it knows outlives its server, so that a test can stop it and start it again on the same port.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc
import grpc.aio

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.common.v1 import common_pb2
from fanlight.contract.limits import PROVENANCE_LIMIT_BYTES, check_bytes
from fanlight.contract.names import digest_of
from fanlight.errors import FailedPrecondition, InvalidField, LeaseLost, NotFound, ResultRefused, Unavailable
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.kernel.grpc_admission import TokenInterceptor
from services.kernel.grpc_guards import ErrorInterceptor

PATIENCE_S = 20.0
CHUNK_BYTES = 32 * 1024
Status = queue_pb2.RenewedLease.Status


class FakeGateway:
    def __init__(
        self, *, ttl_s: float = 0.6, token: str = "", credentials: grpc.ServerCredentials | None = None
    ) -> None:
        self.ttl_s = ttl_s
        self.credentials = credentials
        self.token = token
        self.port = 0
        # Tasks without a lease, and the leased tasks by token.
        self.waiting: list[queue_pb2.LeasedTask] = []
        self.leased: dict[bytes, queue_pb2.LeasedTask] = {}
        self.completed: dict[bytes, queue_pb2.CompleteTaskRequest] = {}
        self.failed: dict[str, list[queue_pb2.FailTaskRequest]] = {}
        # Leases that a poll did not name, by task.
        self.taken_back: Counter[str] = Counter()
        self.results: Counter[str] = Counter()
        self.polls: list[queue_pb2.LeaseTasksRequest] = []
        self.open_polls = 0
        self.renewals: list[queue_pb2.RenewLeasesRequest] = []
        self.progress: dict[str, list[queue_pb2.Progress]] = {}
        # What to answer to the renewal of a task, by its name.
        self.statuses: dict[str, Status.ValueType] = {}
        self.wants_capabilities = 0
        # How large an output may be that comes along, and whether one is dropped all the same, as by an older gateway.
        self.inline_output_bytes_max = 0
        self.drops_inline = False
        # Whether it is one that needs no lists of models that did not change.
        self.knows_holdings = False
        # How many of the next calls of a method are answered UNAVAILABLE before, or after, they took effect.
        self.refusals: Counter[str] = Counter()
        self.lost_answers: Counter[str] = Counter()
        # How many of the next results are looked at and refused, which ends their attempts.
        self.refused_results = 0
        self.calls: Counter[str] = Counter()
        self.blobs: dict[str, bytes] = {}
        self.corrupt: set[str] = set()
        # Addresses to read blobs from directly, by digest.
        self.addresses: dict[str, str] = {}
        # How many of the next reads are cut, and after how many bytes.
        self.cuts = 0
        self.cut_after_bytes = CHUNK_BYTES
        self.read_offsets: list[int] = []
        self._changed = asyncio.Condition()
        self._tokens = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        tokens = (self.token,) if self.token else ()
        server = grpc.aio.server(
            interceptors=[TokenInterceptor({}, default=tokens), ErrorInterceptor()], options=[("grpc.so_reuseport", 0)]
        )
        queue_pb2_grpc.add_QueueServiceServicer_to_server(_Queue(self), server)
        blobs_pb2_grpc.add_BlobServiceServicer_to_server(_Blobs(self), server)
        if self.credentials is None:
            self.port = server.add_insecure_port(self.address)
        else:
            self.port = server.add_secure_port(self.address, self.credentials)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.stop()

    async def offer(self, *tasks: queue_pb2.LeasedTask) -> None:
        self.waiting.extend(tasks)
        await self.change()

    async def change(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until the condition holds; TimeoutError if that takes far too long."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(holds)

    def keep(self, data: bytes) -> common_pb2.Blob:
        digest = digest_of(data)
        self.blobs[digest] = data
        return common_pb2.Blob(scope="default", digest=digest, size_bytes=len(data))

    def token_of(self, name: str) -> bytes:
        return next(token for token, task in self.leased.items() if task.name == name)

    def faults(self, name: str) -> list[str]:
        return [queue_pb2.FailTaskRequest.Fault.Name(each.fault) for each in self.failed.get(name, [])]

    # What the servicers do.

    async def begin(self, method: str) -> None:
        self.calls[method] += 1
        await self.change()
        if self.refusals[method] > 0:
            self.refusals[method] -= 1
            raise Unavailable("refused by the test")

    async def end(self, method: str) -> None:
        await self.change()
        if self.lost_answers[method] > 0:
            self.lost_answers[method] -= 1
            raise Unavailable("the answer was lost by the test")

    def take_back(self, held: set[bytes]) -> None:
        for token in [token for token in self.leased if token not in held]:
            task = self.leased.pop(token)
            self.taken_back[task.name] += 1
            self.waiting.insert(0, task)

    async def wait_for_tasks(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: bool(self.waiting))
        except TimeoutError:
            pass

    def lease(self, count: int) -> list[queue_pb2.LeasedTask]:
        return [self._lease_one(self.waiting.pop(0)) for _ in range(min(count, len(self.waiting)))]

    def _lease_one(self, task: queue_pb2.LeasedTask) -> queue_pb2.LeasedTask:
        self._tokens += 1
        leased = queue_pb2.LeasedTask()
        leased.CopyFrom(task)
        leased.lease_token = f"token-{self._tokens}".encode()
        leased.ttl_s = self.ttl_s
        self.leased[leased.lease_token] = task
        return leased

    def renew(self, renewal: queue_pb2.Renewal) -> queue_pb2.RenewedLease:
        token = renewal.lease_token
        task = self.leased.get(token)
        if task is None:
            return queue_pb2.RenewedLease(lease_token=token, status=Status.STATUS_LOST)
        if renewal.HasField("progress"):
            self.progress.setdefault(task.name, []).append(renewal.progress)
        status = self.statuses.get(task.name, Status.STATUS_RENEWED)
        if status != Status.STATUS_RENEWED:
            del self.leased[token]
        return queue_pb2.RenewedLease(lease_token=token, status=status, ttl_s=self.ttl_s)

    def complete(self, request: queue_pb2.CompleteTaskRequest) -> None:
        if request.lease_token in self.completed:
            return
        if request.lease_token not in self.leased:
            raise LeaseLost("the token is no longer the task's")
        if not request.outputs:
            raise InvalidField("has 0 entries; a task has one output", field="outputs")
        for output in request.outputs:
            check_bytes(output.provenance_json, PROVENANCE_LIMIT_BYTES, field="outputs[0].provenance_json")
        if not self.drops_inline:
            self.blobs.update({each.blob.digest: each.data for each in request.outputs if each.data})
        if any(output.blob.digest not in self.blobs for output in request.outputs):
            raise FailedPrecondition("no such blob", field="outputs")
        if self.refused_results:
            self.refused_results -= 1
            del self.leased[request.lease_token]
            raise ResultRefused("is no image", field="outputs[0].blob")
        self.results[self.leased.pop(request.lease_token).name] += 1
        self.completed[request.lease_token] = request

    def fail(self, request: queue_pb2.FailTaskRequest) -> None:
        if request.lease_token not in self.leased:
            raise LeaseLost("the token is no longer the task's")
        task = self.leased.pop(request.lease_token)
        self.failed.setdefault(task.name, []).append(request)
        if request.fault == queue_pb2.FailTaskRequest.FAULT_RETURNED:
            self.waiting.append(task)


class _Queue(queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, gateway: FakeGateway) -> None:
        self._gateway = gateway

    async def LeaseTasks(self, request: queue_pb2.LeaseTasksRequest, context: Any) -> queue_pb2.LeaseTasksResponse:
        gateway = self._gateway
        gateway.polls.append(request)
        await gateway.begin("LeaseTasks")
        gateway.take_back(set(request.held_lease_tokens))
        gateway.open_polls += 1
        try:
            await gateway.change()
            if request.max_tasks:
                await gateway.wait_for_tasks(request.wait_s)
        finally:
            gateway.open_polls -= 1
            await gateway.change()
        tasks = gateway.lease(request.max_tasks)
        await gateway.end("LeaseTasks")
        wants = gateway.wants_capabilities > 0
        gateway.wants_capabilities -= wants
        known = request.holdings_digest if gateway.knows_holdings else b""
        return queue_pb2.LeaseTasksResponse(
            tasks=tasks,
            wants_capabilities=wants,
            holdings_digest=known,
            inline_output_bytes_max=gateway.inline_output_bytes_max,
        )

    async def RenewLeases(self, request: queue_pb2.RenewLeasesRequest, context: Any) -> queue_pb2.RenewLeasesResponse:
        await self._gateway.begin("RenewLeases")
        self._gateway.renewals.append(request)
        leases = [self._gateway.renew(each) for each in request.renewals]
        await self._gateway.end("RenewLeases")
        return queue_pb2.RenewLeasesResponse(leases=leases)

    async def CompleteTask(
        self, request: queue_pb2.CompleteTaskRequest, context: Any
    ) -> queue_pb2.CompleteTaskResponse:
        await self._gateway.begin("CompleteTask")
        self._gateway.complete(request)
        await self._gateway.end("CompleteTask")
        return queue_pb2.CompleteTaskResponse()

    async def FailTask(self, request: queue_pb2.FailTaskRequest, context: Any) -> queue_pb2.FailTaskResponse:
        await self._gateway.begin("FailTask")
        self._gateway.fail(request)
        await self._gateway.end("FailTask")
        return queue_pb2.FailTaskResponse()


class _Blobs(blobs_pb2_grpc.BlobServiceServicer):
    def __init__(self, gateway: FakeGateway) -> None:
        self._gateway = gateway

    async def WriteBlob(
        self, request_iterator: AsyncIterator[blobs_pb2.WriteBlobRequest], context: Any
    ) -> blobs_pb2.WriteBlobResponse:
        await self._gateway.begin("WriteBlob")
        header, data = None, b""
        async for part in request_iterator:
            if part.HasField("header"):
                header = part.header
            data += part.chunk
        if header is None or header.digest != digest_of(data) or header.size_bytes != len(data):
            raise InvalidField("does not fit the bytes", field="header")
        blob = self._gateway.keep(data)
        await self._gateway.end("WriteBlob")
        return blobs_pb2.WriteBlobResponse(blob=blob)

    async def ReadBlob(
        self, request: blobs_pb2.ReadBlobRequest, context: Any
    ) -> AsyncIterator[blobs_pb2.ReadBlobResponse]:
        gateway = self._gateway
        await gateway.begin("ReadBlob")
        if request.digest not in gateway.blobs:
            raise NotFound("no such blob", field="digest")
        gateway.read_offsets.append(request.offset_bytes)
        data = gateway.blobs[request.digest]
        if request.digest in gateway.corrupt:
            data = bytes(len(data))
        yield blobs_pb2.ReadBlobResponse(blob=common_pb2.Blob(digest=request.digest, size_bytes=len(data)))
        end = len(data)
        is_cut = gateway.cuts > 0
        if is_cut:
            gateway.cuts -= 1
            end = min(end, request.offset_bytes + gateway.cut_after_bytes)
        for start in range(request.offset_bytes, end, CHUNK_BYTES):
            yield blobs_pb2.ReadBlobResponse(chunk=data[start : min(start + CHUNK_BYTES, end)])
        if is_cut:
            raise Unavailable("cut by the test")

    async def PrepareRead(self, request: blobs_pb2.PrepareReadRequest, context: Any) -> blobs_pb2.PrepareReadResponse:
        await self._gateway.begin("PrepareRead")
        return blobs_pb2.PrepareReadResponse(url=self._gateway.addresses.get(request.digest, ""))

    async def HasBlobs(self, request: blobs_pb2.HasBlobsRequest, context: Any) -> blobs_pb2.HasBlobsResponse:
        await self._gateway.begin("HasBlobs")
        return blobs_pb2.HasBlobsResponse(digests=[each for each in request.digests if each in self._gateway.blobs])
