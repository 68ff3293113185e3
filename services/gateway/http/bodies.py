"""What HTTP requests carry, read within limits: query parameters, raw streams, JSON and forms. Knows no message."""

import asyncio
import codecs
import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, NoReturn

from fastapi import Depends, Query, Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from fanlight.contract.names import parse_scope
from fanlight.errors import DeadlineExceeded, InvalidField, TooLarge
from services.gateway.app.peer_roles import Role, require_role
from services.gateway.app.tenants import Caller, Callers
from services.gateway.domain.keys import Right
from services.gateway.http.connections import AUTH_CONTEXT
from services.gateway.http.encodings import inflated, is_compressed
from services.gateway.http.hosts import HostNames
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.disks import no_temporary_file

# How long a client may let an answer wait.
WAIT_LIMIT_S = 60.0
FORM = "multipart/form-data"
# The part of a form that has the job's JSON.
JOB_PART = "job"
# As many images as a job can have, and some more.
FORM_FILES_LIMIT = 64
FORM_FIELDS_LIMIT = 16
READ_BYTES = 256 * 1024

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    # Who may call, by their bearer tokens.
    callers: Callers = field(default_factory=Callers)
    # Under which names, and from which pages.
    host_names: HostNames = field(default_factory=HostNames)
    # The largest JSON body, or `job` part of a form.
    json_limit_bytes: int = 64 * MIB
    # The largest blob, raw or as a file of a form.
    blob_limit_bytes: int = 64 * MIB
    # The largest form, all its files together.
    form_limit_bytes: int = 256 * MIB
    # How long a body may stop coming before the request is refused.
    body_idle_s: float = 60.0
    # A body must come this fast, on the whole, after that long: dripping extends nothing.
    body_slowest_bps: int = 8_000
    # How long the rest of a refused body may stop coming before the connection is closed.
    linger_idle_s: float = 2.0
    # Interval of an event stream's heartbeats; home routers drop idle connections.
    heartbeat_s: float = 15.0
    # How many requests are answered at a time.
    requests_limit: int = 1_000


Wait = Annotated[float, Query(ge=0, le=WAIT_LIMIT_S, description="Seconds to wait for the job to end.")]
Scope = Annotated[str, Query(description="Whose blobs; empty means your own.")]


async def caller_of(request: Request) -> Caller:
    """As the token guard found; it runs before every path that needs a caller."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


class CallerWith:
    """The caller, if it has the right; PermissionDenied otherwise. Each path depends on one of these."""

    def __init__(self, right: Right) -> None:
        self.right = right

    async def __call__(self, request: Request) -> Caller:
        caller = await caller_of(request)
        caller.require(self.right)
        if self.right is Right.OPERATE:
            # With mutual TLS, a client's certificate does not do.
            require_role(getattr(request.state, AUTH_CONTEXT, {}), Role.OPERATOR)
        return caller


Reader = Annotated[Caller, Depends(CallerWith(Right.READ))]
Submitter = Annotated[Caller, Depends(CallerWith(Right.SUBMIT))]
Manager = Annotated[Caller, Depends(CallerWith(Right.MANAGE))]
QueueReader = Annotated[Caller, Depends(CallerWith(Right.QUEUE))]
MetricsReader = Annotated[Caller, Depends(CallerWith(Right.METRICS))]
Operator = Annotated[Caller, Depends(CallerWith(Right.OPERATE))]
FOR_OPERATORS = Depends(CallerWith(Right.OPERATE))


def refuse_unknown(request: Request) -> None:
    """InvalidField for a query parameter that the path does not have, or that is given twice.

    A typing mistake must not go unnoticed.
    """
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    seen = set()
    for name, _ in request.query_params.multi_items():
        if name not in known:
            raise InvalidField(f"is not known; the parameters are {', '.join(known) or 'none'}", field=name)
        if name in seen:
            raise InvalidField("is given twice", field=name)
        seen.add(name)


def scope_of(text: str, caller: Caller) -> str:
    return caller.scope_of(parse_scope(text, field="scope"), field="scope")


def content_type(request: Request) -> str:
    """The body's media type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def announced_bytes(request: Request) -> int:
    """The body's size by Content-Length; 0 for unknown, as before it is inflated."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() and not is_compressed(request) else 0


def refuse_announced(request: Request, *, limit_bytes: int) -> None:
    """TooLarge if Content-Length exceeds the limit."""
    if announced_bytes(request) > limit_bytes:
        _too_large(limit_bytes)


async def raw(request: Request, options: HttpOptions, *, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks, inflated where they are gzip. TooLarge as soon as that is known.

    DeadlineExceeded when the body stops coming. Raises Starlette's ClientDisconnect if the client disconnects in the
    middle.
    """
    refuse_announced(request, limit_bytes=limit_bytes)
    sent = _sent(request, options, limit_bytes=limit_bytes)
    if not is_compressed(request):
        async for chunk in sent:
            yield chunk
        return
    seen_bytes = 0
    async for piece in inflated(sent):
        seen_bytes += len(piece)
        if seen_bytes > limit_bytes:
            _too_large(limit_bytes)
        yield piece


async def _sent(request: Request, options: HttpOptions, *, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    seen_bytes = 0
    chunks = request.stream()
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    while True:
        late_s = begin_s + options.body_idle_s + seen_bytes * 8 / options.body_slowest_bps
        idle_s = loop.time() + options.body_idle_s
        try:
            async with asyncio.timeout_at(min(late_s, idle_s)):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            if idle_s <= late_s:
                raise DeadlineExceeded(f"no byte of the body came for {options.body_idle_s:g} s") from error
            raise DeadlineExceeded(f"the body came slower than {options.body_slowest_bps:,} bit/s") from error
        if chunk is None:
            return
        seen_bytes += len(chunk)
        if seen_bytes > limit_bytes:
            _too_large(limit_bytes)
        if chunk:
            yield chunk


def _too_large(limit_bytes: int) -> NoReturn:
    raise TooLarge(f"has more than {limit_bytes} bytes", field="body")


async def read_json(request: Request, options: HttpOptions) -> object:
    """The body's JSON value. InvalidField says where it is not JSON."""
    if content_type(request) != "application/json":
        raise InvalidField(f"must be application/json or {FORM}", field="Content-Type")
    data = bytearray()
    async for chunk in raw(request, options, limit_bytes=options.json_limit_bytes):
        data += chunk
    return parse_json(bytes(data), field="body")


def parse_json(data: bytes, *, field: str) -> object:
    try:
        # With a byte order mark or without.
        text = data.removeprefix(codecs.BOM_UTF8).decode()
        value: object = json.loads(
            text, parse_constant=_not_a_number, parse_float=_finite, object_pairs_hook=_no_repeats
        )
    except UnicodeDecodeError as error:
        raise InvalidField(f"is not UTF-8 at byte {error.start}", field=field) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidField(f"is not JSON: {error.msg}, {where}", field=field) from error
    except RecursionError as error:
        raise InvalidField("is nested too deeply", field=field) from error
    except ValueError as error:
        raise InvalidField(f"is not JSON that we accept: {error}", field=field) from error
    return value


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_a_number(text)


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form's parts by name. Its files are open until `close`."""

    data: FormData
    # The JSON of JOB_PART, where it is no file.
    fields: dict[str, str]
    files: dict[str, UploadFile]
    # Parts without a file name: files where one is expected, and of no concern elsewhere.
    unnamed: dict[str, UploadFile]

    async def close(self) -> None:
        # What could not be written before cannot be written now.
        with contextlib.suppress(OSError):
            await self.data.close()

    def file(self, name: str) -> UploadFile | None:
        return self.files.get(name) or self.unnamed.get(name)

    def only_file(self) -> tuple[str, UploadFile]:
        """InvalidField for none or several."""
        files = self.files or self.unnamed
        if len(files) != 1:
            raise InvalidField(f"must have one file; this form has {len(files)}", field="body")
        return next(iter(files.items()))


class _FormParser(MultiPartParser):
    """Every part is a file, except the job's: whoever makes a form by hand forgets the file names."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        is_unnamed = b"filename" not in options and options.get(b"name") not in (None, JOB_PART.encode())
        if is_unnamed and part.content_disposition is not None:
            part.content_disposition = part.content_disposition.rstrip(b"; ") + b"; filename=unnamed"
        super().on_headers_finished()
        if is_unnamed and part.file is not None:
            part.file.filename = None


async def read_form(request: Request, options: HttpOptions) -> Form:
    """A whole multipart body; its files are in unnamed temporary files. Unavailable where there is no room for them."""
    parser = _FormParser(
        request.headers,
        raw(request, options, limit_bytes=options.form_limit_bytes),
        max_files=FORM_FILES_LIMIT,
        max_fields=FORM_FIELDS_LIMIT,
        max_part_size=options.json_limit_bytes,
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise InvalidField(f"is not {FORM} that we accept: {error.message}", field="body") from error
    except UnicodeDecodeError as error:
        raise InvalidField("has a part that is not UTF-8", field="body") from error
    except OSError as error:
        raise no_temporary_file(error) from error
    try:
        return _by_name(data)
    except InvalidField:
        await data.close()
        raise


def _by_name(data: FormData) -> Form:
    form = Form(data=data, fields={}, files={}, unnamed={})
    for name, part in data.multi_items():
        if name in form.fields or form.file(name):
            raise InvalidField("is given twice", field=name)
        if isinstance(part, str):
            form.fields[name] = part
        elif part.filename is None:
            form.unnamed[name] = part
        else:
            form.files[name] = part
    return form


async def chunks_of(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await _read(file, READ_BYTES):
        yield chunk


async def _read(file: UploadFile, limit_bytes: int) -> bytes:
    try:
        return await file.read(limit_bytes)
    except OSError as error:
        raise no_temporary_file(error) from error


async def read_file(file: UploadFile, *, limit_bytes: int, field: str) -> bytes:
    data = await _read(file, limit_bytes + 1)
    if len(data) > limit_bytes:
        raise TooLarge(f"has more than {limit_bytes} bytes", field=field)
    return data


async def store_body(
    request: Request, blobs: BlobStore, options: HttpOptions, *, scope: str, digest: str = ""
) -> BlobInfo:
    """Store the raw body, or the one file of a form, as a blob. InvalidField for no file or several."""
    if content_type(request) == FORM:
        form = await read_form(request, options)
        try:
            name, file = form.only_file()
            return await store_file(blobs, name, file, scope=scope, digest=digest)
        finally:
            await form.close()
    if request.headers.get("content-length") == "0":
        raise InvalidField("is empty", field="body")
    refuse_announced(request, limit_bytes=options.blob_limit_bytes)
    chunks = raw(request, options, limit_bytes=options.blob_limit_bytes)
    return await blobs.write(scope, chunks, digest=digest, size_bytes=announced_bytes(request))


async def store_file(blobs: BlobStore, name: str, file: UploadFile, *, scope: str, digest: str = "") -> BlobInfo:
    """Store a form's file as a blob. TooLarge names the part."""
    try:
        return await blobs.write(scope, chunks_of(file), digest=digest)
    except TooLarge as error:
        raise error.within(name) from error
