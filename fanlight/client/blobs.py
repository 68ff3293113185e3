"""Bytes up and down by digest, in chunks; what comes down is checked against it."""

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

if TYPE_CHECKING:
    from fanlight.blobs.v1.blobs_pb2_grpc import BlobServiceAsyncStub

CHUNK_BYTES = 256 * 1024
ADDRESS_TIMEOUT_S = 10.0
SILENCE_S = 30.0


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Blobs:
    """The blob calls of a client, over its channel and with its retries."""

    def __init__(self, stub: "BlobServiceAsyncStub", retry: Retry, *, scope: str) -> None:
        self._stub = stub
        self._retry = retry
        self._scope = scope
        # Whether the gateway may know an address that gives bytes past it, and this client may reach that.
        self._asks_for_addresses = True

    async def write(self, data: bytes, *, timeout_s: float) -> Blob:
        """Keeps the bytes; sends them only where the gateway has them not."""
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
        """The bytes of a blob, or of a digest in the client's scope. BrokenBlob where they are other bytes."""
        wanted = Blob(scope=self._scope, digest=blob) if isinstance(blob, str) else blob
        data = await self._read_past(wanted)
        if data is None:
            data = await self._retry.call(lambda left_s: self._read(wanted, left_s), timeout_s=timeout_s)
        if digest_of(data) != wanted.digest:
            raise BrokenBlob(f"{wanted.digest}: other bytes arrived; try again")
        return data

    async def _read_past(self, wanted: Blob) -> bytes | None:
        """From where the gateway keeps it; None where that cannot be, and then no more is tried."""
        if not self._asks_for_addresses:
            return None
        request = blobs_pb2.PrepareReadRequest(scope=wanted.scope, digest=wanted.digest)
        try:
            answer = await self._stub.PrepareRead(request, timeout=ADDRESS_TIMEOUT_S)
            data = await asyncio.to_thread(_fetched, answer.url) if answer.url else b""
            # Somebody between here and the storage may answer in its stead.
            if answer.url and digest_of(data) == wanted.digest:
                return data
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                return None
        except (OSError, http.client.HTTPException):
            pass
        self._asks_for_addresses = False
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
        raise OSError("no address that is fetched")
    with urllib.request.urlopen(url, timeout=SILENCE_S) as answer:
        data: bytes = answer.read()
    return data


async def _parts(scope: str, digest: str, data: bytes) -> AsyncIterator[blobs_pb2.WriteBlobRequest]:
    header = blobs_pb2.WriteBlobHeader(scope=scope, digest=digest, size_bytes=len(data))
    yield blobs_pb2.WriteBlobRequest(header=header)
    for start in range(0, len(data), CHUNK_BYTES):
        yield blobs_pb2.WriteBlobRequest(chunk=data[start : start + CHUNK_BYTES])
