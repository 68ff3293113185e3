"""Bytes from and to the gateway, in chunks, taken up again where a cut left them, checked by digest."""

import hashlib
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc.aio

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.common.v1 import common_pb2
from fanlight.contract.digests import DEFAULT_SCOPE, digest_of, named
from fanlight.errors import FanlightError, NodeFault, TooLarge
from services.kernel.logs import get_logger
from services.worker.bypass import get, put
from services.worker.goodput import Goodput
from services.worker.patience import Patience
from services.worker.queue_calls import CALL_DEADLINE_S, our_errors
from services.worker.surroundings import Surroundings

log = get_logger()

CHUNK_BYTES = 256 * 1024
# A gateway whose storage takes and gives nothing past it, or out of this node's reach, is not asked with every blob.
ASK_AGAIN_S = 600.0
# One try; a longer one goes on with the next try.
TRANSFER_DEADLINE_S = 300.0


class _Receipt:
    """What of a blob has come so far."""

    def __init__(self, blob: common_pb2.Blob, *, limit_bytes: int) -> None:
        self.data = bytearray()
        # Some of it past the gateway.
        self.came_past = False
        self._blob = blob
        self._limit_bytes = limit_bytes
        self._sha256 = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        self.data += chunk
        self._sha256.update(chunk)
        if len(self.data) > self._limit_bytes:
            raise TooLarge(f"more than {self._limit_bytes} bytes")

    @property
    def is_full(self) -> bool:
        """No more has to come, as far as its size is known."""
        return 0 < self._blob.size_bytes <= len(self.data)

    @property
    def is_right(self) -> bool:
        return named(self._sha256.hexdigest()) == self._blob.digest


class BlobCalls:
    """Failures are NodeFaults: what the gateway keeps, and how, is not the request's fault."""

    def __init__(
        self, channel: grpc.aio.Channel, patience: Patience, surroundings: Surroundings, *, read_bytes_max: int
    ) -> None:
        self._stub: blobs_pb2_grpc.BlobServiceAsyncStub = blobs_pb2_grpc.BlobServiceStub(channel)
        self._patience = patience
        self._surroundings = surroundings
        self._read_bytes_max = read_bytes_max
        self._no_bypass_until_s = -math.inf
        self.goodput = Goodput()

    async def read(self, blob: common_pb2.Blob) -> bytes:
        """The blob's bytes, which have its digest. TooLarge when it says that it is."""
        if blob.size_bytes > self._read_bytes_max:
            raise TooLarge(f"an input picture has {blob.size_bytes} bytes; at most {self._read_bytes_max} are fetched")
        receipt = await self._fetched(blob)
        if receipt.came_past and not receipt.is_right:
            # Somebody between here and the storage answered in its stead.
            self._avoid_bypass()
            receipt = await self._fetched(blob)
        if not receipt.is_right:
            raise NodeFault(f"an input picture came with the wrong bytes for {blob.digest}")
        return bytes(receipt.data)

    async def _fetched(self, blob: common_pb2.Blob) -> _Receipt:
        receipt = _Receipt(blob, limit_bytes=self._read_bytes_max)

        async def attempt() -> None:
            await self._receive(blob, receipt)

        try:
            await self._patience.insist(attempt, doing="read_blob")
        except FanlightError as error:
            raise NodeFault(f"an input picture could not be fetched: {error.message}") from error
        return receipt

    async def _receive(self, blob: common_pb2.Blob, receipt: _Receipt) -> None:
        if not receipt.data:
            await self._receive_past(blob, receipt)
        if receipt.is_full:
            return
        request = blobs_pb2.ReadBlobRequest(scope=blob.scope, digest=blob.digest, offset_bytes=len(receipt.data))
        with self._measured(receipt), our_errors():
            async for message in self._stub.ReadBlob(request, timeout=TRANSFER_DEADLINE_S):
                receipt.add(message.chunk)

    @contextmanager
    def _measured(self, receipt: _Receipt) -> Iterator[None]:
        """What came without an error tells how fast the link is."""
        begin_bytes, start_s = len(receipt.data), self._surroundings.now_s()
        yield
        self.goodput.note(len(receipt.data) - begin_bytes, self._surroundings.now_s() - start_s)

    async def _receive_past(self, blob: common_pb2.Blob, receipt: _Receipt) -> None:
        """From the gateway's storage itself, where the gateway gives an address for that; perhaps not all of it."""
        if self._avoids_bypass:
            return
        request = blobs_pb2.PrepareReadRequest(scope=blob.scope, digest=blob.digest)
        try:
            with our_errors():
                answer = await self._stub.PrepareRead(request, timeout=CALL_DEADLINE_S)
        except FanlightError as error:
            log.info("read_past_not_possible", reason=error.reason, message=error.message)
            return
        if not answer.url:
            self._avoid_bypass()
            return
        receipt.came_past = True
        try:
            with self._measured(receipt):
                await get(answer.url, receipt.add)
        except NodeFault as error:
            log.info("read_past_not_possible", reason=error.reason, message=error.message)
            self._avoid_bypass()

    @property
    def _avoids_bypass(self) -> bool:
        return self._surroundings.now_s() < self._no_bypass_until_s

    def _avoid_bypass(self) -> None:
        self._no_bypass_until_s = self._surroundings.now_s() + ASK_AGAIN_S

    async def write(self, data: bytes, *, scope: str = "") -> common_pb2.Blob:
        """Keep the bytes at the gateway, in the scope that their task names. Durable once the task is completed."""
        blob = common_pb2.Blob(scope=scope or DEFAULT_SCOPE, digest=digest_of(data), size_bytes=len(data))
        tries = 0

        async def attempt() -> None:
            nonlocal tries
            tries += 1
            # The answer to the first try may be all that was lost.
            is_there = await (self._sent_past(blob, data) if tries == 1 else self._has(blob))
            if not is_there:
                await self._send(blob, data)

        try:
            await self._patience.insist(attempt, doing="write_blob")
        except FanlightError as error:
            raise NodeFault(f"an output could not be handed in: {error.message}") from error
        return blob

    async def _sent_past(self, blob: common_pb2.Blob, data: bytes) -> bool:
        """Sent to the gateway's storage itself, where the gateway gives an address for that."""
        if self._avoids_bypass:
            return False
        request = blobs_pb2.PrepareUploadRequest(scope=blob.scope, digest=blob.digest, size_bytes=blob.size_bytes)
        try:
            with our_errors():
                answer = await self._stub.PrepareUpload(request, timeout=CALL_DEADLINE_S)
        except FanlightError as error:
            log.info("upload_not_possible", reason=error.reason, message=error.message)
            return False
        if not answer.url:
            if not answer.is_kept:
                self._avoid_bypass()
            return answer.is_kept
        try:
            await put(answer.url, {header.name: header.value for header in answer.headers}, data)
        except NodeFault as error:
            log.info("upload_not_possible", reason=error.reason, message=error.message)
            self._avoid_bypass()
            return False
        return True

    async def _has(self, blob: common_pb2.Blob) -> bool:
        with our_errors():
            request = blobs_pb2.HasBlobsRequest(scope=blob.scope, digests=[blob.digest])
            answer = await self._stub.HasBlobs(request, timeout=CALL_DEADLINE_S)
        return blob.digest in answer.digests

    async def _send(self, blob: common_pb2.Blob, data: bytes) -> None:
        with our_errors():
            await self._stub.WriteBlob(_parts(blob, data), timeout=TRANSFER_DEADLINE_S)


async def _parts(blob: common_pb2.Blob, data: bytes) -> AsyncIterator[blobs_pb2.WriteBlobRequest]:
    header = blobs_pb2.WriteBlobHeader(scope=blob.scope, digest=blob.digest, size_bytes=blob.size_bytes)
    yield blobs_pb2.WriteBlobRequest(header=header)
    for start in range(0, len(data), CHUNK_BYTES):
        yield blobs_pb2.WriteBlobRequest(chunk=data[start : start + CHUNK_BYTES])
