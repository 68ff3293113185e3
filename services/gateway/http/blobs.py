"""`/v1/blobs`: bytes in by stream, out by digest. A blob never changes, so it may be cached for ever."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from fanlight.contract.digests import parse_digest
from fanlight.errors import NotFound, OutOfRange
from services.gateway.http import documents
from services.gateway.http.json_messages import answer, of_value
from services.gateway.http.options import HttpOptions
from services.gateway.http.parameters import Asking, Scope, refuse_unknown, scope_of
from services.gateway.http.ranges import Part, Unsatisfiable, part_of
from services.gateway.http.uploads import keep_body
from services.gateway.ports import Bypass
from services.gateway.wire.blobs import blob
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.wire_errors import to_body

UNKNOWN_MEDIA_TYPE = "application/octet-stream"


class BlobRoutes:
    def __init__(self, blobs: BlobStore, options: HttpOptions) -> None:
        self._blobs = blobs
        self._options = options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["blobs"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        add("/v1/blobs", self.write, methods=["POST"], **documents.WRITE_BLOB)
        add("/v1/blobs/{digest}", self.read, methods=["GET"], **documents.READ_BLOB)
        add("/v1/blobs/{digest}", self.read, methods=["HEAD"], include_in_schema=False)
        return router

    async def write(
        self,
        request: Request,
        caller: Asking,
        digest: Annotated[str, Query(description="What the bytes must hash to.")] = "",
        scope: Scope = "",
    ) -> Response:
        wanted = digest and parse_digest(digest, field="digest")
        info = await keep_body(request, self._blobs, self._options, scope=scope_of(scope, caller), digest=wanted)
        headers = {"Location": f"/v1/blobs/{info.digest}"}
        return answer(blob(info), status=201, headers=headers)

    async def read(
        self,
        request: Request,
        caller: Asking,
        digest: str,
        scope: Scope = "",
        redirect: Annotated[bool, Query(description="Rather be sent to where the bytes are, if that can be.")] = False,
    ) -> Response:
        parsed_scope = scope_of(scope, caller)
        # An address is signed for a GET.
        if redirect and request.method == "GET" and isinstance(self._blobs, Bypass):
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


def blob_answer(
    blobs: BlobStore, info: BlobInfo, headers: Mapping[str, str], *, part: Part | None = None, head_only: bool = False
) -> Response:
    """The blob's bytes, or a part of them."""
    span = part or Part(offset_bytes=0, size_bytes=info.size_bytes)
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


def _part(request: Request, info: BlobInfo, etag: str) -> Part | None:
    condition = request.headers.get("if-range", "")
    if condition and condition != etag:
        return None
    return part_of(request.headers.get("range", ""), info.size_bytes)


def _names(header: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return etag in tags or tags == ["*"]


def _unsatisfiable(info: BlobInfo) -> Response:
    error = OutOfRange(f"the blob has {info.size_bytes} bytes", field="Range")
    headers = {"Content-Range": f"bytes */{info.size_bytes}", "Cache-Control": "no-store"}
    return of_value(to_body(error), status=416, headers=headers)
