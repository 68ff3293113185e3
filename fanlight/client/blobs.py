"""Uploads and downloads blobs by digest, in chunks; checks what arrives against the digest."""

import asyncio
import hashlib
import http.client
import urllib.request
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from fanlight.blobs.v1 import blobs_pb2
from fanlight.client.retry import Retry
from fanlight.common.v1.common_pb2 import Blob
from fanlight.errors import BrokenBlob
from fanlight.proxies import BadProxy, proxy_for

if TYPE_CHECKING:
    from fanlight.blobs.v1.blobs_pb2_grpc import BlobServiceAsyncStub

CHUNK_BYTES = 256 * 1024
ADDRESS_TIMEOUT_S = 10.0
STORAGE_TIMEOUT_S = 30.0


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class BlobTransfer:
    """The blob calls of a client, over its channel and with its retries."""

    def __init__(self, stub: "BlobServiceAsyncStub", retry: Retry, *, scope: str) -> None:
        self._stub = stub
        self._retry = retry
        self._scope = scope
        # Whether the storage may have an address of its own that this client can reach.
        self._may_read_direct = True

    async def write(self, data: bytes, *, timeout_s: float) -> Blob:
        """Stores the bytes; sends them only if the gateway does not have them."""
        digest = digest_of(data)
        blob = Blob(scope=self._scope, digest=digest, size_bytes=len(data))
        if not await self._has(digest, timeout_s=timeout_s):
            await self._retry.call(
                lambda left_s: self._stub.WriteBlob(_parts(self._scope, digest, data), timeout=left_s),
                timeout_s=timeout_s,
            )
        return blob

    async def _has(self, digest: str, *, timeout_s: float) -> bool:
        request = blobs_pb2.HasBlobsRequest(scope=self._scope, digests=[digest])
        answer = await self._retry.call(
            lambda left_s: self._stub.HasBlobs(request, timeout=left_s), timeout_s=timeout_s
        )
        return digest in answer.digests

    async def read(self, blob: Blob | str, *, timeout_s: float) -> bytes:
        """The bytes of a blob, or of a digest in the client's scope. BrokenBlob where other bytes arrive."""
        wanted = Blob(scope=self._scope, digest=blob) if isinstance(blob, str) else blob
        data = await self._read_direct(wanted)
        if data is None:
            data = await self._retry.call(lambda left_s: self._read(wanted, left_s), timeout_s=timeout_s)
        if digest_of(data) != wanted.digest:
            raise BrokenBlob(f"{wanted.digest}: other bytes arrived; try again")
        return data

    async def delete(self, blob: Blob | str, *, timeout_s: float) -> int:
        """How many blobs were deleted."""
        wanted = Blob(scope=self._scope, digest=blob) if isinstance(blob, str) else blob
        request = blobs_pb2.DeleteBlobRequest(scope=wanted.scope, digest=wanted.digest)
        answer = await self._retry.call(
            lambda left_s: self._stub.DeleteBlob(request, timeout=left_s), timeout_s=timeout_s
        )
        return answer.blobs

    async def _read_direct(self, wanted: Blob) -> bytes | None:
        """From the gateway's storage itself; None where that is not possible, and then it is not tried again."""
        if not self._may_read_direct:
            return None
        request = blobs_pb2.PrepareReadRequest(scope=wanted.scope, digest=wanted.digest)
        try:
            answer = await self._stub.PrepareRead(request, timeout=ADDRESS_TIMEOUT_S)
            data = await asyncio.to_thread(_fetched, answer.url) if answer.url else b""
            # A proxy between here and the storage may answer instead of it.
            if answer.url and digest_of(data) == wanted.digest:
                return data
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                return None
        except (OSError, http.client.HTTPException):
            pass
        self._may_read_direct = False
        return None

    async def _read(self, wanted: Blob, timeout_s: float) -> bytes:
        request = blobs_pb2.ReadBlobRequest(scope=wanted.scope, digest=wanted.digest)
        size_bytes, data = 0, bytearray()
        async for part in self._stub.ReadBlob(request, timeout=timeout_s):
            size_bytes = part.blob.size_bytes if part.HasField("blob") else size_bytes
            data += part.chunk
            if len(data) > size_bytes:
                raise BrokenBlob(f"{wanted.digest}: more bytes arrived than were announced")
        return bytes(data)


def _fetched(url: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise OSError("not an http or https address")
    try:
        proxy = proxy_for(url)
    except BadProxy as error:
        raise OSError(str(error)) from error
    # Empty: no proxy, whatever the environment says.
    handler = urllib.request.ProxyHandler({"http": proxy, "https": proxy} if proxy else {})
    with urllib.request.build_opener(handler).open(url, timeout=STORAGE_TIMEOUT_S) as answer:
        data: bytes = answer.read()
    return data


async def _parts(scope: str, digest: str, data: bytes) -> AsyncIterator[blobs_pb2.WriteBlobRequest]:
    header = blobs_pb2.WriteBlobHeader(scope=scope, digest=digest, size_bytes=len(data))
    yield blobs_pb2.WriteBlobRequest(header=header)
    for start in range(0, len(data), CHUNK_BYTES):
        yield blobs_pb2.WriteBlobRequest(chunk=data[start : start + CHUNK_BYTES])
