"""Bodies of requests, read within limits: raw streams, JSON and forms. Knows no message."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import NoReturn

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from fanlight.errors import DeadlineExceeded, InvalidField, TooLarge
from services.gateway.http.options import HttpOptions

FORM = "multipart/form-data"
# As many pictures as a job can have, and some room.
FORM_FILES_LIMIT = 64
FORM_FIELDS_LIMIT = 16
READ_BYTES = 256 * 1024


def content_type(request: Request) -> str:
    """The body's media type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def announced_bytes(request: Request) -> int:
    """What Content-Length says; 0 where it says nothing."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() else 0


def refuse_announced(request: Request, *, limit_bytes: int) -> None:
    """TooLarge when Content-Length says more than the limit."""
    if announced_bytes(request) > limit_bytes:
        _too_large(limit_bytes)


async def raw(request: Request, options: HttpOptions, *, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes. TooLarge as soon as that is known, DeadlineExceeded when it stops coming.

    A client that goes away in the middle raises Starlette's ClientDisconnect.
    """
    refuse_announced(request, limit_bytes=limit_bytes)
    seen_bytes = 0
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout(options.body_idle_s):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no byte of the body came for {options.body_idle_s:g} s") from error
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
    """The body's JSON value. InvalidField says where it is none."""
    if content_type(request) != "application/json":
        raise InvalidField(f"must be application/json or {FORM}", field="Content-Type")
    data = bytearray()
    async for chunk in raw(request, options, limit_bytes=options.json_limit_bytes):
        data += chunk
    return parse_json(bytes(data), field="body")


def parse_json(data: bytes, *, field: str) -> object:
    try:
        value: object = json.loads(
            data.decode(), parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_no_repeats
        )
    except UnicodeDecodeError as error:
        raise InvalidField(f"is not UTF-8 at byte {error.start}", field=field) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidField(f"is not JSON: {error.msg}, {where}", field=field) from error
    except RecursionError as error:
        raise InvalidField("is nested too deeply", field=field) from error
    except ValueError as error:
        raise InvalidField(f"is not JSON that we take: {error}", field=field) from error
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form's parts by name. Files are open; `close` them."""

    data: FormData
    fields: dict[str, str]
    files: dict[str, UploadFile]

    async def close(self) -> None:
        await self.data.close()


async def read_form(request: Request, options: HttpOptions) -> Form:
    """All of a multipart body; its files lie in temporary files that have no name."""
    parser = MultiPartParser(
        request.headers,
        raw(request, options, limit_bytes=options.form_limit_bytes),
        max_files=FORM_FILES_LIMIT,
        max_fields=FORM_FIELDS_LIMIT,
        max_part_size=options.json_limit_bytes,
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise InvalidField(f"is not {FORM} that we take: {error.message}", field="body") from error
    except UnicodeDecodeError as error:
        raise InvalidField("has a part that is not UTF-8", field="body") from error
    try:
        return _by_name(data)
    except InvalidField:
        await data.close()
        raise


def _by_name(data: FormData) -> Form:
    fields: dict[str, str] = {}
    files: dict[str, UploadFile] = {}
    for name, part in data.multi_items():
        if name in fields or name in files:
            raise InvalidField("is given twice", field=name)
        if isinstance(part, str):
            fields[name] = part
        else:
            files[name] = part
    return Form(data=data, fields=fields, files=files)


async def chunks_of(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(READ_BYTES):
        yield chunk


async def read_file(file: UploadFile, *, limit_bytes: int, field: str) -> bytes:
    data = await file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise TooLarge(f"has more than {limit_bytes} bytes", field=field)
    return data
