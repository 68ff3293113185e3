"""`/v1/blobs`: bytes in by stream, out by digest. A blob never changes, so it may be cached forever."""

import re
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from fanlight.blobs.v1 import blobs_pb2
from fanlight.contract.names import parse_digest
from fanlight.errors import NotFound, OutOfRange
from services.gateway.app.gateway import Gateway
from services.gateway.http import docs
from services.gateway.http.bodies import (
    HttpOptions,
    Reader,
    Scope,
    Submitter,
    announced_bytes,
    refuse_unknown,
    scope_of,
    store_body,
)
from services.gateway.http.json_messages import answer, of_value
from services.gateway.ports import DirectTransfer
from services.gateway.wire.images import blob
from services.kernel.blobs import BlobInfo, BlobStore, ByteRange
from services.kernel.errors_wire import to_body

UNKNOWN_MEDIA_TYPE = "application/octet-stream"

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})", re.IGNORECASE)


class Unsatisfiable(Exception):
    """The range starts past the end."""


def range_of(header: str, size_bytes: int) -> ByteRange | None:
    """The byte range of a Range header; None for the whole blob, also for an invalid header or several ranges."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.group(0).strip() == "" or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        offset_bytes, end_bytes = max(0, size_bytes - int(last)), size_bytes
    else:
        offset_bytes, end_bytes = int(first), min(size_bytes, int(last) + 1 if last else size_bytes)
        if last and int(last) < offset_bytes:
            return None
    if offset_bytes >= end_bytes:
        raise Unsatisfiable
    return ByteRange(offset_bytes=offset_bytes, size_bytes=end_bytes - offset_bytes)


class BlobRoutes:
    def __init__(self, gateway: Gateway, blobs: BlobStore, options: HttpOptions) -> None:
        self._gateway, self._quotas = gateway, gateway.quotas
        self._blobs = blobs
        self._options = options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["blobs"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        add("/v1/blobs", self.write, methods=["POST"], **docs.WRITE_BLOB)
        add("/v1/blobs/{digest}", self.read, methods=["GET"], **docs.READ_BLOB)
        add("/v1/blobs/{digest}", self.read, methods=["HEAD"], include_in_schema=False)
        add("/v1/blobs/{digest}", self.delete, methods=["DELETE"], **docs.DELETE_BLOB)
        return router

    async def write(
        self,
        request: Request,
        caller: Submitter,
        digest: Annotated[str, Query(description="The digest that the bytes must have.")] = "",
        scope: Scope = "",
    ) -> Response:
        wanted = digest and parse_digest(digest, field="digest")
        parsed_scope = scope_of(scope, caller)
        with self._quotas.upload(caller, announced_bytes(request)):
            info = await store_body(request, self._blobs, self._options, scope=parsed_scope, digest=wanted)
        headers = {"Location": f"/v1/blobs/{info.digest}"}
        return answer(blob(info), status=201, headers=headers)

    async def read(
        self,
        request: Request,
        caller: Reader,
        digest: str,
        scope: Scope = "",
        redirect: Annotated[bool, Query(description="Redirect to where the bytes are stored, if possible.")] = False,
    ) -> Response:
        parsed_scope = scope_of(scope, caller)
        target = f"blobs/{parsed_scope}/{parse_digest(digest, field='digest')}"
        await self._gateway.audit.note_read("blobs.read", target, tenant=parsed_scope)
        # The address is signed for GET only.
        if redirect and request.method == "GET" and isinstance(self._blobs, DirectTransfer):
            url = await self._blobs.prepare_read(parsed_scope, parse_digest(digest, field="digest"))
            return RedirectResponse(url, status_code=307, headers={"Cache-Control": "no-store"})
        info = await self._blobs.stat(parsed_scope, parse_digest(digest, field="digest"))
        if info is None:
            raise NotFound(f"no blob {digest}", field="digest")
        etag = f'"{info.digest}"'
        headers = {"ETag": etag, "Cache-Control": "private, max-age=31536000, immutable", "Accept-Ranges": "bytes"}
        if _names(request.headers.get("if-none-match", ""), etag):
            return Response(status_code=304, headers=headers)
        try:
            part = _part(request, info, etag)
        except Unsatisfiable:
            return _unsatisfiable(info)
        return blob_answer(self._blobs, info, headers, part=part, head_only=request.method == "HEAD")

    async def delete(self, caller: Submitter, digest: str, scope: Scope = "") -> Response:
        parsed_scope, wanted = scope_of(scope, caller), parse_digest(digest, field="digest")
        deleted = await self._gateway.deletions.delete_blob(parsed_scope, wanted, caller)
        return answer(blobs_pb2.DeleteBlobResponse(blobs=deleted))


def blob_answer(
    blobs: BlobStore,
    info: BlobInfo,
    headers: Mapping[str, str],
    *,
    part: ByteRange | None = None,
    head_only: bool = False,
) -> Response:
    """The blob's bytes, or a part of them."""
    span = part or ByteRange(offset_bytes=0, size_bytes=info.size_bytes)
    all_headers = {
        **headers,
        "Content-Length": str(span.size_bytes),
        "Content-Type": info.media_type or UNKNOWN_MEDIA_TYPE,
        "X-Content-Type-Options": "nosniff",
    }
    if part is not None:
        last = part.offset_bytes + part.size_bytes - 1
        all_headers["Content-Range"] = f"bytes {part.offset_bytes}-{last}/{info.size_bytes}"
    status = 200 if part is None else 206
    if head_only or not span.size_bytes:
        return Response(status_code=status, headers=all_headers)
    chunks = blobs.read(info.scope, info.digest, offset_bytes=span.offset_bytes, limit_bytes=span.size_bytes)
    return StreamingResponse(chunks, status_code=status, headers=all_headers)


def _part(request: Request, info: BlobInfo, etag: str) -> ByteRange | None:
    condition = request.headers.get("if-range", "")
    if condition and condition != etag:
        return None
    return range_of(request.headers.get("range", ""), info.size_bytes)


def _names(header: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return etag in tags or tags == ["*"]


def _unsatisfiable(info: BlobInfo) -> Response:
    error = OutOfRange(f"the blob has {info.size_bytes} bytes", field="Range")
    headers = {"Content-Range": f"bytes */{info.size_bytes}", "Cache-Control": "no-store"}
    return of_value(to_body(error), status=416, headers=headers)
