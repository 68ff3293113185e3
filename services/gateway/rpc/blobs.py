"""BlobService over gRPC: streams into and out of the BlobStore. Knows no jobs."""

import contextlib
from collections.abc import AsyncIterator

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.contract.names import DEFAULT_SCOPE, parse_digest, parse_scope
from fanlight.errors import InvalidField, NotFound, OutOfRange, PermissionDenied, TooLarge
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.deletion import Deletions
from services.gateway.app.lease_rights import LeaseRights
from services.gateway.app.quotas import Quotas
from services.gateway.domain.keys import Right
from services.gateway.ports import DirectTransfer
from services.gateway.rpc.principals import Principals
from services.gateway.wire.images import blob
from services.kernel.blobs import BlobStore
from services.kernel.grpc_admission import Context

CHUNK_OUT_BYTES = 512 * 1024
CHUNK_IN_LIMIT_BYTES = 1024 * 1024
DIGESTS_LIMIT = 1_000


class BlobService(blobs_pb2_grpc.BlobServiceServicer):
    def __init__(
        self,
        blobs: BlobStore,
        principals: Principals,
        rights: LeaseRights,
        quotas: Quotas,
        deletions: Deletions,
        audit: AuditLog,
    ) -> None:
        """A client reads and writes in its own scope, a worker what its live leases are about."""
        self._deletions, self._audit = deletions, audit
        self._blobs = blobs
        self._bypass = blobs if isinstance(blobs, DirectTransfer) else None
        self._principals, self._rights, self._quotas = principals, rights, quotas

    def _writable(self, named: str, context: Context, *, field: str) -> str:
        """The scope, if the caller may write in it. NotFound, LeaseLost."""
        scope = parse_scope(named, field=field)
        if (client := self._principals.client(context)) is not None:
            client.require(Right.SUBMIT)
            return client.scope_of(scope, field=field)
        self._rights.require_write(self._principals.worker(context), scope)
        return scope

    async def _readable(self, named: str, text: str, context: Context) -> tuple[str, str]:
        """The scope and the digest, if the caller may read that blob of it. NotFound, LeaseLost."""
        client = self._principals.client(context)
        if client is not None:
            client.require(Right.READ)
        scope, digest = parse_scope(named, field="scope"), parse_digest(text, field="digest")
        if client is not None:
            scope = client.scope_of(scope, field="scope")
            await self._audit.note_read("blobs.read", f"blobs/{scope}/{digest}", tenant=scope)
            return scope, digest
        self._rights.require_read(self._principals.worker(context), scope, digest)
        return scope, digest

    async def WriteBlob(
        self, request_iterator: AsyncIterator[blobs_pb2.WriteBlobRequest], context: Context
    ) -> blobs_pb2.WriteBlobResponse:
        header = await _header(request_iterator)
        scope = self._writable(header.scope, context, field="header.scope")
        with self._place(context, header):
            info = await self._blobs.write(
                scope,
                _chunks(request_iterator),
                digest=header.digest and parse_digest(header.digest, field="header.digest"),
                size_bytes=_natural(header.size_bytes, "header.size_bytes"),
            )
        return blobs_pb2.WriteBlobResponse(blob=blob(info))

    def _place(self, context: Context, header: blobs_pb2.WriteBlobHeader) -> contextlib.AbstractContextManager[None]:
        """For an upload of a client's. ResourceExhausted."""
        client = self._principals.client(context)
        if client is None:
            return contextlib.nullcontext()
        return self._quotas.upload(client, max(0, header.size_bytes))

    async def ReadBlob(
        self, request: blobs_pb2.ReadBlobRequest, context: Context
    ) -> AsyncIterator[blobs_pb2.ReadBlobResponse]:
        scope, digest = await self._readable(request.scope, request.digest, context)
        offset_bytes = _natural(request.offset_bytes, "offset_bytes")
        limit_bytes = _natural(request.limit_bytes, "limit_bytes")
        info = await self._blobs.stat(scope, digest)
        if info is None:
            raise NotFound(f"no blob {digest}", field="digest")
        if offset_bytes > info.size_bytes:
            raise OutOfRange(f"the blob has {info.size_bytes} bytes", field="offset_bytes")
        yield blobs_pb2.ReadBlobResponse(blob=blob(info))
        async for chunk in self._blobs.read(scope, digest, offset_bytes=offset_bytes, limit_bytes=limit_bytes):
            for start in range(0, len(chunk), CHUNK_OUT_BYTES):
                yield blobs_pb2.ReadBlobResponse(chunk=chunk[start : start + CHUNK_OUT_BYTES])

    async def PrepareUpload(
        self, request: blobs_pb2.PrepareUploadRequest, context: Context
    ) -> blobs_pb2.PrepareUploadResponse:
        scope = self._writable(request.scope, context, field="scope")
        digest = parse_digest(request.digest, field="digest")
        if self._bypass is None:
            return blobs_pb2.PrepareUploadResponse()
        size_bytes = _natural(request.size_bytes, "size_bytes")
        if (client := self._principals.client(context)) is not None:
            self._quotas.require_blob_bytes(client, size_bytes)
        upload = await self._bypass.prepare_upload(scope, digest, size_bytes)
        if upload is None:
            return blobs_pb2.PrepareUploadResponse(is_kept=True)
        headers = [blobs_pb2.UploadHeader(name=name, value=value) for name, value in upload.headers.items()]
        return blobs_pb2.PrepareUploadResponse(url=upload.url, headers=headers)

    async def PrepareRead(
        self, request: blobs_pb2.PrepareReadRequest, context: Context
    ) -> blobs_pb2.PrepareReadResponse:
        scope, digest = await self._readable(request.scope, request.digest, context)
        if self._bypass is None:
            return blobs_pb2.PrepareReadResponse()
        return blobs_pb2.PrepareReadResponse(url=await self._bypass.prepare_read(scope, digest))

    async def HasBlobs(self, request: blobs_pb2.HasBlobsRequest, context: Context) -> blobs_pb2.HasBlobsResponse:
        scope = self._writable(request.scope, context, field="scope")
        if len(request.digests) > DIGESTS_LIMIT:
            raise TooLarge(f"has {len(request.digests)} entries; at most {DIGESTS_LIMIT}", field="digests")
        digests = [parse_digest(text, field=f"digests[{index}]") for index, text in enumerate(request.digests)]
        return blobs_pb2.HasBlobsResponse(
            digests=[digest for digest in digests if await self._blobs.settle(scope, digest) is not None]
        )

    async def DeleteBlob(self, request: blobs_pb2.DeleteBlobRequest, context: Context) -> blobs_pb2.DeleteBlobResponse:
        client = self._principals.client(context)
        if client is None:
            raise PermissionDenied("workers delete no blobs")
        client.require(Right.SUBMIT)
        scope = client.scope_of(parse_scope(request.scope or DEFAULT_SCOPE, field="scope"), field="scope")
        digest = parse_digest(request.digest, field="digest")
        return blobs_pb2.DeleteBlobResponse(blobs=await self._deletions.delete_blob(scope, digest, client))


async def _header(requests: AsyncIterator[blobs_pb2.WriteBlobRequest]) -> blobs_pb2.WriteBlobHeader:
    first = await anext(aiter(requests), None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidField("must come first, before any chunk", field="header")
    return first.header


async def _chunks(requests: AsyncIterator[blobs_pb2.WriteBlobRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidField("must follow the header; nothing else may", field="chunk")
        if len(request.chunk) > CHUNK_IN_LIMIT_BYTES:
            raise TooLarge(f"has {len(request.chunk)} bytes; at most {CHUNK_IN_LIMIT_BYTES}", field="chunk")
        yield request.chunk


def _natural(number: int, field: str) -> int:
    if number < 0:
        raise InvalidField("must not be negative", field=field)
    return number
