"""Blobs from and to the gateway: chunked, resumed after a cut, checked by digest; or directly from and to its storage.

Knows no storage and holds no credentials: the gateway gives a signed address for each direct transfer.
"""

import asyncio
import base64
import hashlib
import http.client
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from urllib.parse import SplitResult, unquote, urlsplit

import grpc.aio

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.common.v1 import common_pb2
from fanlight.contract.names import DEFAULT_SCOPE, digest_of, named
from fanlight.errors import FanlightError, NodeFault, TooLarge
from fanlight.proxies import BadProxy, proxy_for
from services.kernel.averages import MovingAverage
from services.kernel.logs import get_logger
from services.kernel.network import certificate_problem, tls_context
from services.worker.retry import CALL_DEADLINE_S, Env, RetryPolicy, our_errors

log = get_logger()

CHUNK_BYTES = 256 * 1024
# How long a storage that gave no address, or could not be reached, is not asked again.
ASK_AGAIN_S = 600.0
# For one attempt; the next one resumes a longer transfer.
TRANSFER_DEADLINE_S = 300.0
CONNECT_S = 10.0
# The longest time without a byte; a slow link may take long for the whole transfer.
SILENCE_S = 60.0
# Smaller downloads measure the round trip, not the link.
MEASURED_BYTES_MIN = 64 * 1024
# How much the latest measurement counts.
GOODPUT_WEIGHT = 0.3
# The storage has the bytes already: another worker sent the same.
_PRESENT = 412


class Goodput:
    """The download rate, measured while blobs are fetched: a moving average, and the deviation from it."""

    def __init__(self) -> None:
        self._rate_bps = MovingAverage(weight=GOODPUT_WEIGHT)

    @property
    def bps(self) -> float:
        """Bits per second; 0 before the first measurement."""
        return self._rate_bps.mean

    @property
    def deviation_bps(self) -> float:
        return self._rate_bps.deviation

    def note(self, size_bytes: int, duration_s: float) -> None:
        if size_bytes >= MEASURED_BYTES_MIN and duration_s > 0:
            self._rate_bps.note(size_bytes * 8 / duration_s)


class _PartialBlob:
    """The bytes of a blob that have arrived so far."""

    def __init__(self, blob: common_pb2.Blob, *, limit_bytes: int) -> None:
        self.data = bytearray()
        # Some bytes may have come directly from the storage.
        self.is_direct = False
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
        """There are no more bytes to come, if the blob's size is known."""
        return 0 < self._blob.size_bytes <= len(self.data)

    @property
    def has_right_digest(self) -> bool:
        return named(self._sha256.hexdigest()) == self._blob.digest


class BlobCalls:
    """Failures are NodeFaults: what the gateway stores, and how, is not the request's fault.

    A direct transfer that fails opens a circuit breaker: for ASK_AGAIN_S everything goes through the gateway.
    """

    def __init__(self, channel: grpc.aio.Channel, retry: RetryPolicy, env: Env, *, read_bytes_max: int) -> None:
        self._stub: blobs_pb2_grpc.BlobServiceAsyncStub = blobs_pb2_grpc.BlobServiceStub(channel)
        self._retry = retry
        self._env = env
        self._read_bytes_max = read_bytes_max
        self._no_direct_until_s = -math.inf
        self.goodput = Goodput()

    async def read(self, blob: common_pb2.Blob) -> bytes:
        """The blob's bytes, checked against its digest. TooLarge if they are more than `read_bytes_max`."""
        if blob.size_bytes > self._read_bytes_max:
            raise TooLarge(f"an input image has {blob.size_bytes} bytes; at most {self._read_bytes_max} are fetched")
        partial = await self._fetch(blob)
        if partial.is_direct and not partial.has_right_digest:
            # Something between here and the storage answered instead of it, such as a proxy.
            self._break_circuit()
            partial = await self._fetch(blob)
        if not partial.has_right_digest:
            raise NodeFault(f"an input image arrived with the wrong bytes for {blob.digest}")
        return bytes(partial.data)

    async def _fetch(self, blob: common_pb2.Blob) -> _PartialBlob:
        partial = _PartialBlob(blob, limit_bytes=self._read_bytes_max)

        async def attempt() -> None:
            await self._receive(blob, partial)

        try:
            await self._retry.call(attempt, doing="read_blob")
        except FanlightError as error:
            raise NodeFault(f"an input image could not be fetched: {error.message}") from error
        return partial

    async def _receive(self, blob: common_pb2.Blob, partial: _PartialBlob) -> None:
        if not partial.data:
            await self._receive_directly(blob, partial)
        if partial.is_full:
            return
        request = blobs_pb2.ReadBlobRequest(scope=blob.scope, digest=blob.digest, offset_bytes=len(partial.data))
        with self._measured(partial), our_errors():
            async for message in self._stub.ReadBlob(request, timeout=TRANSFER_DEADLINE_S):
                partial.add(message.chunk)

    @contextmanager
    def _measured(self, partial: _PartialBlob) -> Iterator[None]:
        """Bytes that arrive inside, without an error, are a measurement of the link."""
        begin_bytes, start_s = len(partial.data), self._env.now_s()
        yield
        self.goodput.note(len(partial.data) - begin_bytes, self._env.now_s() - start_s)

    async def _receive_directly(self, blob: common_pb2.Blob, partial: _PartialBlob) -> None:
        """Download from the gateway's storage, if the gateway gives an address; perhaps only a part arrives."""
        if self._is_circuit_open:
            return
        request = blobs_pb2.PrepareReadRequest(scope=blob.scope, digest=blob.digest)
        try:
            with our_errors():
                answer = await self._stub.PrepareRead(request, timeout=CALL_DEADLINE_S)
        except FanlightError as error:
            log.info("direct_download_failed", reason=error.reason, message=error.message)
            return
        if not answer.url:
            self._break_circuit()
            return
        partial.is_direct = True
        try:
            with self._measured(partial):
                await download(answer.url, partial.add)
        except NodeFault as error:
            log.info("direct_download_failed", reason=error.reason, message=error.message)
            self._break_circuit()

    @property
    def _is_circuit_open(self) -> bool:
        return self._env.now_s() < self._no_direct_until_s

    def _break_circuit(self) -> None:
        self._no_direct_until_s = self._env.now_s() + ASK_AGAIN_S

    async def write(self, data: bytes, *, scope: str = "") -> common_pb2.Blob:
        """Store the bytes at the gateway, in their task's scope. Durable once the task is completed."""
        blob = blob_of(data, scope)
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            # Perhaps only the answer to the first attempt was lost.
            is_stored = await (self._send_directly(blob, data) if attempts == 1 else self._has(blob))
            if not is_stored:
                await self._send(blob, data)

        try:
            await self._retry.call(attempt, doing="write_blob")
        except FanlightError as error:
            raise NodeFault(f"an output could not be uploaded: {error.message}") from error
        return blob

    async def _send_directly(self, blob: common_pb2.Blob, data: bytes) -> bool:
        """Upload to the gateway's storage, if the gateway gives an address. Whether the bytes are stored."""
        if self._is_circuit_open:
            return False
        request = blobs_pb2.PrepareUploadRequest(scope=blob.scope, digest=blob.digest, size_bytes=blob.size_bytes)
        try:
            with our_errors():
                answer = await self._stub.PrepareUpload(request, timeout=CALL_DEADLINE_S)
        except FanlightError as error:
            log.info("direct_upload_failed", reason=error.reason, message=error.message)
            return False
        if not answer.url:
            if not answer.is_kept:
                self._break_circuit()
            return answer.is_kept
        try:
            await upload(answer.url, {header.name: header.value for header in answer.headers}, data)
        except NodeFault as error:
            log.info("direct_upload_failed", reason=error.reason, message=error.message)
            self._break_circuit()
            return False
        return True

    async def _has(self, blob: common_pb2.Blob) -> bool:
        with our_errors():
            request = blobs_pb2.HasBlobsRequest(scope=blob.scope, digests=[blob.digest])
            answer = await self._stub.HasBlobs(request, timeout=CALL_DEADLINE_S)
        return blob.digest in answer.digests

    async def _send(self, blob: common_pb2.Blob, data: bytes) -> None:
        with our_errors():
            await self._stub.WriteBlob(_chunks(blob, data), timeout=TRANSFER_DEADLINE_S)


def blob_of(data: bytes, scope: str) -> common_pb2.Blob:
    """The name of those bytes in a task's scope."""
    return common_pb2.Blob(scope=scope or DEFAULT_SCOPE, digest=digest_of(data), size_bytes=len(data))


async def _chunks(blob: common_pb2.Blob, data: bytes) -> AsyncIterator[blobs_pb2.WriteBlobRequest]:
    header = blobs_pb2.WriteBlobHeader(scope=blob.scope, digest=blob.digest, size_bytes=blob.size_bytes)
    yield blobs_pb2.WriteBlobRequest(header=header)
    for start in range(0, len(data), CHUNK_BYTES):
        yield blobs_pb2.WriteBlobRequest(chunk=data[start : start + CHUNK_BYTES])


async def upload(url: str, headers: Mapping[str, str], data: bytes) -> None:
    """PUT the bytes to a storage's address. NodeFault if they are not stored afterwards."""
    await asyncio.to_thread(_put, urlsplit(url), headers, data)


async def download(url: str, receive: Callable[[bytes], None]) -> None:
    """GET all bytes and pass each chunk to `receive`, on another thread. NodeFault if the download breaks off."""
    await asyncio.to_thread(_get, urlsplit(url), receive)


def _put(url: SplitResult, headers: Mapping[str, str], data: bytes) -> None:
    with _connected(url, "upload") as connection:
        connection.request("PUT", _target(url), data, dict(headers))
        status = connection.getresponse().status
    if not 200 <= status < 300 and status != _PRESENT:
        raise NodeFault(f"the upload was refused with {status}")


def _get(url: SplitResult, receive: Callable[[bytes], None]) -> None:
    with _connected(url, "download") as connection:
        connection.request("GET", _target(url))
        answer = connection.getresponse()
        if answer.status != 200:
            raise NodeFault(f"the download was refused with {answer.status}")
        while chunk := answer.read(CHUNK_BYTES):
            receive(chunk)


@contextmanager
def _connected(url: SplitResult, doing: str) -> Iterator[http.client.HTTPConnection]:
    """A connection to the address; what goes wrong with it inside is a NodeFault."""
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(closing(_connection(url)))
            connection.connect()
            connection.sock.settimeout(SILENCE_S)
            yield connection
        except (OSError, http.client.HTTPException, BadProxy) as error:
            told = certificate_problem(error, url.hostname or "it")
            raise NodeFault(f"the {doing} broke: {told or type(error).__name__}") from error


def _target(url: SplitResult) -> str:
    return f"{url.path}?{url.query}" if url.query else url.path


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    assert url.hostname is not None
    if proxy := proxy_for(url.geturl()):
        return _proxied(url, urlsplit(proxy))
    if url.scheme == "https":
        return http.client.HTTPSConnection(url.hostname, url.port, timeout=CONNECT_S, context=tls_context())
    return http.client.HTTPConnection(url.hostname, url.port, timeout=CONNECT_S)


def _proxied(url: SplitResult, proxy: SplitResult) -> http.client.HTTPConnection:
    """Through a tunnel. OSError for SOCKS: the bytes then travel by the gateway."""
    if proxy.scheme != "http" or proxy.hostname is None or url.hostname is None:
        raise OSError(f"a proxy of kind {proxy.scheme} cannot be used")
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    connection = (
        http.client.HTTPSConnection(proxy.hostname, proxy.port or 80, timeout=CONNECT_S, context=tls_context())
        if url.scheme == "https"
        else http.client.HTTPConnection(proxy.hostname, proxy.port or 80, timeout=CONNECT_S)
    )
    login = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if proxy.username else {}
    connection.set_tunnel(url.hostname, port, headers)
    return connection
