"""How handlers of gRPC are called: admitted, given one message that was read and checked, and errors leave as a status.

A client never sees a traceback. Knows no service.
"""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from fanlight.contract.finite import refuse_at_edge
from fanlight.errors import FanlightError, InvalidField, TooLarge
from services.kernel.disks import is_of_disk, unavailable
from services.kernel.errors_wire import find_broken_string, to_status
from services.kernel.grpc_admission import CallAdmission, Context, Continuation, Handler, OpenCall, is_open
from services.kernel.logs import get_logger

log = get_logger()

T = TypeVar("T")

NO_LIMITS: Mapping[str, int] = {}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Our errors leave as google.rpc.Status; anything else as INTERNAL with a reference to the log."""

    def __init__(self, admission: CallAdmission | None = None, message_limits: Mapping[str, int] = NO_LIMITS) -> None:
        """`message_limits`: by full service name, the most bytes of a request, below the server's own limit.

        gRPC has one limit for all services of a server, so it holds such a message before it is refused here; but it
        is not parsed, which would take many times its bytes.
        """
        self._admission, self._message_limits = admission or CallAdmission(), message_limits
        # By method: the handler, and the same handler guarded. Only methods that exist.
        self._guarded: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        name = handler_call_details.method
        original, guarded = self._guarded.get(name, (None, handler))
        if original is not handler:
            limit_bytes = self._message_limits.get(name[1:].partition("/")[0])
            guarded = _guarded(handler, name, self._admission, limit_bytes)
            self._guarded[name] = (handler, guarded)
        return guarded


async def _translate_errors(call: Callable[[], Awaitable[T]], context: Context) -> T:
    try:
        return await hide_unexpected_errors(call)
    except FanlightError as error:
        status = to_status(error)
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort raises")


async def hide_unexpected_errors(call: Callable[[], Awaitable[T]]) -> T:
    """The call's result. An unexpected exception becomes a FanlightError with a reference to the log."""
    try:
        return await call()
    except (FanlightError, grpc.aio.AbortError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_of_disk(error):
            raise unavailable(error) from error
        reference = uuid.uuid4().hex[:12]
        log.exception("handler_failed", reference=reference)
        raise FanlightError(f"internal error, reference {reference}") from error


def _guarded(handler: Handler, method: str, admission: CallAdmission, limit_bytes: int | None) -> Handler:
    """The same handler, with every call admitted, and its errors and those of a streamed response translated.

    Where no token is needed it reads the call's one message itself, because gRPC would wait for it without a limit.
    Elsewhere gRPC does, which is quicker.
    """
    reads = is_open(method) and not handler.request_streaming
    takes_stream = reads or handler.request_streaming
    if handler.response_streaming:
        behavior = _guarded_stream(handler, method, admission, reads=reads)
        make = grpc.stream_stream_rpc_method_handler if takes_stream else grpc.unary_stream_rpc_method_handler
    else:
        behavior = _guarded_unary(handler, method, admission, reads=reads)
        make = grpc.stream_unary_rpc_method_handler if takes_stream else grpc.unary_unary_rpc_method_handler
    return make(behavior, _lenient(handler.request_deserializer, limit_bytes), handler.response_serializer)


def _guarded_unary(handler: Handler, method: str, admission: CallAdmission, *, reads: bool) -> Callable[..., Any]:
    behavior: Any = handler.stream_unary or handler.unary_unary
    places = admission.places_of(method)
    needs_token = not is_open(method)

    async def unary(sent: Any, context: Context) -> Any:
        async def answer() -> Any:
            request = await admission.read(context) if reads else sent
            with places.taken():
                return await behavior(_checked(request), context)

        if needs_token:
            admission.on_proof(context.peer())
        return await _translate_errors(answer, context)

    return unary


def _guarded_stream(handler: Handler, method: str, admission: CallAdmission, *, reads: bool) -> Callable[..., Any]:
    behavior: Any = handler.stream_stream or handler.unary_stream

    async def stream(sent: Any, context: Context) -> AsyncIterator[Any]:
        responses: Any = None
        call: OpenCall | None = None

        async def begin() -> Any:
            nonlocal call
            request = await admission.read(context) if reads else sent
            call = _take_place(method, context, admission)
            return aiter(behavior(_checked(request), context))

        async def following() -> Any:
            return await anext(responses, _END)

        try:
            responses = await _translate_errors(begin, context)
            while (response := await _awaited(following, call, context)) is not _END:
                yield response
        finally:
            if responses is not None:
                await responses.aclose()

    return stream


def _take_place(method: str, context: Context, admission: CallAdmission) -> OpenCall | None:
    """Until the call ends, which a generator that nobody reads does not notice. Returns a call that may give way."""
    if not is_open(method):
        admission.on_proof(context.peer())
    elif admission.is_unproven(context):
        call = admission.add_unproven(context)
        context.add_done_callback(lambda _: admission.remove_unproven(call))  # type: ignore[arg-type]  # a stub's class
        return call
    places = admission.places_of(method)
    places.take()
    context.add_done_callback(lambda _: places.release())  # type: ignore[arg-type]  # the same
    return None


async def _awaited(following: Callable[[], Awaitable[Any]], call: OpenCall | None, context: Context) -> Any:
    if call is None:
        return await _translate_errors(following, context)
    call.awaits_handler = True
    try:
        return await _translate_errors(following, context)
    finally:
        call.awaits_handler = False


_END = object()


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A request whose bytes cannot be parsed as its type; `field` is the string that is not UTF-8, if that is why."""

    field: str


@dataclass(frozen=True, slots=True)
class _Oversized:
    """A request that has more bytes than its service takes, and was not parsed."""

    size_bytes: int
    limit_bytes: int


def _lenient(deserialize: Callable[[bytes], Any] | None, limit_bytes: int | None) -> Callable[[bytes], Any] | None:
    """Returns _Oversized, or _Unreadable for bytes that cannot be parsed, for which gRPC itself answers INTERNAL."""
    if deserialize is None:
        return None

    # protoc's stubs pass a message class's FromString.
    descriptor = getattr(getattr(deserialize, "__self__", None), "DESCRIPTOR", None)

    def lenient(data: bytes) -> Any:
        if limit_bytes is not None and len(data) > limit_bytes:
            return _Oversized(len(data), limit_bytes)
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable(find_broken_string(descriptor, data) if descriptor else "")

    return lenient


def _checked(request: Any) -> Any:
    if isinstance(request, _Oversized):
        raise TooLarge(f"has {request.size_bytes} bytes; at most {request.limit_bytes} are taken", field="request")
    if isinstance(request, _Unreadable):
        if request.field:
            raise InvalidField("must be UTF-8", field=request.field)
        raise InvalidField("cannot be read: it is truncated or not a message of this type", field="request")
    if hasattr(request, "__aiter__"):
        return _checked_all(request)
    refuse_at_edge(request)
    return request


async def _checked_all(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
