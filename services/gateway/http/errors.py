"""Errors over HTTP: one JSON shape for all of them, and never a traceback."""

import math
import uuid

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fanlight.errors import FanlightError, InvalidField, Unauthenticated
from services.kernel.config import describe_problem
from services.kernel.disks import is_of_disk, unavailable
from services.kernel.errors_wire import http_status, to_body
from services.kernel.logs import get_logger

log = get_logger()

# How many characters of an unknown path the error repeats.
PATH_QUOTED = 100


class UnsupportedEncoding(InvalidField):
    """A Content-Encoding that is not read here: 415."""


def answer(error: FanlightError) -> JSONResponse:
    headers = {"Cache-Control": "no-store"}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    status = http_status(error)
    if isinstance(error, UnsupportedEncoding):
        status, headers["Accept-Encoding"] = 415, "gzip, identity"
    return JSONResponse(to_body(error), status_code=status, headers=headers)


class ErrorGuard:
    """The outermost guard: an unexpected exception becomes INTERNAL with a reference to the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            log.debug("client_gone", path=scope["path"])
        except Exception as error:
            if not started and isinstance(error, OSError) and is_of_disk(error):
                await answer(unavailable(error))(scope, receive, send)
                return
            reference = uuid.uuid4().hex[:12]
            log.exception("request_failed", reference=reference, path=scope["path"])
            if started:
                # The answer has begun; the server closes the connection.
                raise
            body = {"error": {"reason": "INTERNAL", "message": f"internal error, reference {reference}"}}
            await JSONResponse(body, status_code=500)(scope, receive, send)


def install(app: FastAPI) -> None:
    """Give our errors, FastAPI's and Starlette's the same shape."""
    app.add_exception_handler(FanlightError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _of_router)


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, FanlightError)
    return answer(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """For a parameter of the path, the query or the headers that cannot be read."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return answer(InvalidField(describe_problem(first), field=".".join(str(part) for part in first["loc"][1:])))


async def _of_router(request: Request, error: Exception) -> Response:
    """For paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    reason, message = {
        404: ("NOT_FOUND", f"no such path: {request.url.path[:PATH_QUOTED]}; /docs lists the paths"),
        405: ("METHOD_NOT_ALLOWED", f"{request.method} is not possible here"),
    }.get(error.status_code, ("INVALID_FIELD", error.detail))
    body = {"error": {"reason": reason, "message": message}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
