"""Bytes that requests bring, kept as blobs while they come."""

from fastapi import Request
from starlette.datastructures import UploadFile

from fanlight.errors import InvalidField, TooLarge
from services.gateway.http import bodies
from services.gateway.http.options import HttpOptions
from services.kernel.blobs import BlobInfo, BlobStore


async def keep_body(
    request: Request, blobs: BlobStore, options: HttpOptions, *, scope: str, digest: str = ""
) -> BlobInfo:
    """Keep the raw body, or the one file of a form, as a blob. InvalidField for none or several."""
    if bodies.content_type(request) == bodies.FORM:
        form = await bodies.read_form(request, options)
        try:
            if len(form.files) != 1:
                raise InvalidField(f"must have one file; this form has {len(form.files)}", field="body")
            ((name, file),) = form.files.items()
            return await keep_file(blobs, name, file, scope=scope, digest=digest)
        finally:
            await form.close()
    if request.headers.get("content-length") == "0":
        raise InvalidField("is empty", field="body")
    bodies.refuse_announced(request, limit_bytes=options.blob_limit_bytes)
    chunks = bodies.raw(request, options, limit_bytes=options.blob_limit_bytes)
    return await blobs.write(scope, chunks, digest=digest, size_bytes=bodies.announced_bytes(request))


async def keep_file(blobs: BlobStore, name: str, file: UploadFile, *, scope: str, digest: str = "") -> BlobInfo:
    """Keep a form's file as a blob. TooLarge names the part."""
    try:
        return await blobs.write(scope, bodies.chunks_of(file), digest=digest)
    except TooLarge as error:
        raise error.within(name) from error
