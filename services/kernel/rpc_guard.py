"""What stands before every handler: who may call, and how errors leave. A traceback never does."""

import hmac
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from fanlight.errors import FanlightError, InvalidField, Unauthenticated
from services.kernel.logs import get_logger
from services.kernel.wire_errors import to_status
from services.kernel.wire_text import broken_text

log = get_logger()

T = TypeVar("T")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# None where no handler has the method.
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for calls without a token that the called service takes. Health is open to all."""

    def __init__(self, tokens: Mapping[str, tuple[str, ...]], *, default: tuple[str, ...]) -> None:
        """`tokens`: full service name to the tokens it takes; `default` for services not named. Empty: open."""
        self._tokens = tokens
        self._default = default

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.split("/")[1]
        wanted = self._tokens.get(service, self._default)
        if handler is None or not wanted or service in OPEN_SERVICES or _sent(handler_call_details, wanted):
            return handler
        return _wrapped(handler, _refuse)


def _sent(details: grpc.HandlerCallDetails, wanted: tuple[str, ...]) -> bool:
    sent = dict(details.invocation_metadata or ()).get("authorization", "")
    kind, _, token = (sent if isinstance(sent, str) else "").partition(" ")
    if kind.lower() != "bearer":
        return False
    return any(hmac.compare_digest(token.encode(), good.encode()) for good in wanted)


async def _refuse(call: Callable[[], Awaitable[Any]], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    raise Unauthenticated("send the right token as `authorization: bearer TOKEN`")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Our errors leave as google.rpc.Status; anything else as INTERNAL with a reference to the log."""

    def __init__(self) -> None:
        # By method, with what it was made of. Only methods that there are.
        self._guarded: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        name = handler_call_details.method
        made_of, guarded = self._guarded.get(name, (None, handler))
        if made_of is not handler:
            guarded = _wrapped(handler, _translated)
            self._guarded[name] = (handler, guarded)
        return guarded


async def _translated(call: Callable[[], Awaitable[Any]], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    try:
        return await known(call)
    except FanlightError as error:
        status = to_status(error)
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort raises")


async def known(call: Callable[[], Awaitable[T]]) -> T:
    """What the call gives. What nobody expected goes wrong as a FanlightError with a reference to the log."""
    try:
        return await call()
    except (FanlightError, grpc.aio.AbortError):
        raise
    except Exception as error:
        reference = uuid.uuid4().hex[:12]
        log.exception("handler_failed", reference=reference)
        raise FanlightError(f"internal error, reference {reference}") from error


Guard = Callable[[Callable[[], Awaitable[Any]], grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


def _wrapped(handler: Handler, guard: Guard) -> Handler:
    """The same handler with every call, and every step of a streamed answer, run by the guard."""
    behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    deserialize = _forgiving(handler.request_deserializer)

    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await guard(lambda: behaviour(_checked(request), context), context)

    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        answers: Any = None

        async def following() -> Any:
            nonlocal answers
            if answers is None:
                answers = aiter(behaviour(_checked(request), context))
            return await anext(answers, _END)

        try:
            while (answer := await guard(following, context)) is not _END:
                yield answer
        finally:
            if answers is not None:
                await answers.aclose()

    serialize = handler.response_serializer
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(unary, deserialize, serialize)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(stream, deserialize, serialize)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(unary, deserialize, serialize)
    return grpc.stream_stream_rpc_method_handler(stream, deserialize, serialize)


_END = object()


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a request whose bytes are no message of its type; `field` is the text at fault, if it is one."""

    field: str


def _forgiving(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """gRPC would answer INTERNAL for bytes it cannot parse; the handler is told instead."""
    if deserialize is None:
        return None

    # protoc's stubs pass a message class's FromString.
    descriptor = getattr(getattr(deserialize, "__self__", None), "DESCRIPTOR", None)

    def forgiving(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable(broken_text(descriptor, data) if descriptor else "")

    return forgiving


def _checked(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        if request.field:
            raise InvalidField("must be UTF-8", field=request.field)
        raise InvalidField("cannot be read: it is cut short or no such message", field="request")
    if hasattr(request, "__aiter__"):
        return _checked_all(request)
    return request


async def _checked_all(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
