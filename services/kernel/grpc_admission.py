"""Which gRPC calls are let in: by their token before a message is read, then by free places of their kind.

A call without a right token is refused by its metadata alone. One with a token takes a place once its message has
come. Health needs no token; its calls have limits of their own, by address for callers that sent no token, and the
oldest give way. Knows no service.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
import grpc.aio
from grpc_status import rpc_status

from fanlight.errors import (
    DeadlineExceeded,
    FanlightError,
    InvalidField,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from services.kernel.errors_wire import to_status
from services.kernel.unproven import Unproven

OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
# Calls that prove in their message who the caller is.
OPEN_METHODS = frozenset({"/fanlight.nodes.v1.NodeService/Join"})
BUSY_RETRY_AFTER_S = 2.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# Returns None if no handler has the method.
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
Metadata: TypeAlias = "Iterable[tuple[str, str | bytes]]"


# Of a full service name and a token.
Accepts: TypeAlias = "Callable[[str, str], bool]"


def accepts_none(service: str, token: str) -> bool:
    return False


# Of a full service name and a token that it accepts, before each call; raises FanlightError where it may not run now.
Admit: TypeAlias = "Callable[[str, str], Awaitable[None]]"


async def admit_all(service: str, token: str) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    # Calls at a time, of methods that have no places of their own.
    calls: int = 2_000
    # Calls with a token that wait for their message, which takes no place yet.
    unread: int = 4_000
    # Calls of health without a token: whose message has not come, or which watch. In all, and of one address.
    open_calls: int = 2_048
    open_calls_per_address: int = 256
    # How long the message of such a call may take.
    open_read_s: float = 10.0


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for calls without a token that the called service accepts. Open calls need no token."""

    def __init__(
        self,
        tokens: Mapping[str, tuple[str, ...]],
        *,
        default: tuple[str, ...],
        accepts: Accepts = accepts_none,
        admit: Admit = admit_all,
    ) -> None:
        """`tokens`: by full service name, the tokens it accepts; `default` for the others. Empty: no token needed.

        `accepts`: whether a full service name also accepts a token that is made while the server runs.
        """
        self._tokens = tokens
        self._default = default
        self._accepts = accepts
        self._admit = admit

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        service = handler_call_details.method.split("/")[1]
        if not is_open(handler_call_details.method):
            sent = _authorizations(handler_call_details.invocation_metadata)
            if len(sent) > 1:
                return _MANY
            accepted = self._tokens.get(service, self._default)
            if accepted and not _is_bearer(sent, accepted) and not self._accepts(service, _bearer(sent)):
                return _WRONG
            try:
                await self._admit(service, _bearer(sent))
            except FanlightError as error:
                return _refusing(error)
        return await continuation(handler_call_details)


def _authorizations(metadata: "Metadata | None") -> "list[str | bytes]":
    return [value for key, value in metadata or () if key == "authorization"]


def _is_bearer(sent: "list[str | bytes]", accepted: Iterable[str]) -> bool:
    """Whether it is one header with one of the tokens."""
    token = _bearer(sent)
    return bool(token) and any(hmac.compare_digest(token.encode(), each.encode()) for each in accepted)


def _bearer(sent: "list[str | bytes]") -> str:
    """The token of the one header; empty for anything else."""
    if len(sent) != 1 or not isinstance(sent[0], str):
        return ""
    kind, _, token = sent[0].partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def bearer_of(context: "Context") -> str:
    """The call's bearer token; empty without one, or with several."""
    return _bearer(_authorizations(context.invocation_metadata()))


def _refusing(error: FanlightError) -> Handler:
    """Ends the call at once. As a handler of streamed requests it is called before any message is read."""
    status = rpc_status.to_status(to_status(error))

    async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
        await context.abort_with_status(status)

    return grpc.stream_unary_rpc_method_handler(refuse)


_WRONG = _refusing(Unauthenticated("send the right token as `authorization: bearer TOKEN`"))
_STOPPING = _refusing(Unavailable("is stopping: call another server, or this one again later"))
_MANY = _refusing(Unauthenticated("send `authorization` once; this call has it several times"))


class DrainInterceptor(grpc.aio.ServerInterceptor):
    """UNAVAILABLE for new calls while `is_on`, except health."""

    def __init__(self) -> None:
        self.is_on = False

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        if self.is_on and not is_open(handler_call_details.method):
            return _STOPPING
        return await continuation(handler_call_details)


class Places:
    """Of one kind of calls, so many at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken = 0

    def take(self) -> None:
        """ResourceExhausted if none is free."""
        if self._taken >= self.limit:
            raise ResourceExhausted(
                f"{self.limit:,} calls of this kind run already; try again later", retry_after_s=BUSY_RETRY_AFTER_S
            )
        self._taken += 1

    def release(self) -> None:
        self._taken -= 1

    @contextmanager
    def taken(self) -> Iterator[None]:
        self.take()
        try:
            yield
        finally:
            self.release()


class OpenCall:
    """A call that can be ended from outside."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._task = asyncio.current_task()
        # It waits for its handler, not for gRPC: only then may its task be cancelled, because gRPC writes to memory
        # that a cancelled operation has freed.
        self.awaits_handler = False

    async def end(self, error: FanlightError) -> None:
        """Send the error as the call's status, which also ends what it reads."""
        if self.context.done():
            return
        with suppress(grpc.aio.BaseError):
            await self.context.abort_with_status(rpc_status.to_status(to_status(error)))
        if self.awaits_handler and self._task is not None:
            self._task.cancel()


class CallAdmission:
    """Reads the messages of calls that were let in, and counts the calls."""

    def __init__(
        self,
        *,
        limits: CallLimits | None = None,
        places: Mapping[str, int] | None = None,
        tokens: Iterable[str] = (),
        on_proof: Callable[[str], None] = lambda peer: None,
    ) -> None:
        """`places`: by full method, such as `/package.Service/Method`, how many places of its own it has.

        `tokens`: what proves that a caller of an open service is none of the strangers.
        `on_proof`: called with the peer of each call that was let in with a token, or where none is needed.
        """
        self._limits = limits or CallLimits()
        self._own = {method: Places(limit) for method, limit in (places or {}).items()}
        self._shared = Places(self._limits.calls)
        self._open_places = Places(self._limits.calls)
        self._tokens = tuple(tokens)
        self.on_proof = on_proof
        self._unproven: Unproven[OpenCall] = Unproven(
            limit=self._limits.open_calls, limit_per_address=self._limits.open_calls_per_address
        )
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def limit(self) -> int:
        """Of all calls together, so that a caller with a token cannot open calls without end."""
        limits = self._limits
        return sum(each.limit for each in self._own.values()) + limits.calls + limits.open_calls + limits.unread

    def places_of(self, method: str) -> Places:
        return self._open_places if is_open(method) else self._own.get(method, self._shared)

    def is_unproven(self, context: Context) -> bool:
        """Whether a call of an open service comes from a stranger."""
        return not _is_bearer(_authorizations(context.invocation_metadata()), self._tokens)

    async def read(self, context: Context) -> Any:
        """The one message of an open service's call. InvalidField if it has none, and a deadline for strangers."""
        message = await (self._read_unproven(context) if self.is_unproven(context) else context.read())
        if message is grpc.aio.EOF:
            raise InvalidField("is missing: the call ended without its message", field="request")
        return message

    async def _read_unproven(self, context: Context) -> Any:
        late = DeadlineExceeded(f"the call's message did not come within {self._limits.open_read_s:g} s")
        call = self.add_unproven(context)
        timer = asyncio.get_running_loop().call_later(self._limits.open_read_s, self._end, call, late)
        try:
            return await context.read()
        finally:
            timer.cancel()
            self._unproven.remove(call)

    def add_unproven(self, context: Context) -> OpenCall:
        """Count a call without a token; the oldest gives way above a limit. `remove_unproven` when it ends."""
        call = OpenCall(context)
        for oldest in self._unproven.add(call, address_of_peer(context.peer())):
            self._end(oldest, _gave_way())
        return call

    def remove_unproven(self, call: OpenCall) -> None:
        self._unproven.remove(call)

    def _end(self, call: OpenCall, error: FanlightError) -> None:
        ending = asyncio.get_running_loop().create_task(call.end(error))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


def is_open(method: str) -> bool:
    return method in OPEN_METHODS or method.split("/")[1] in OPEN_SERVICES


def _gave_way() -> ResourceExhausted:
    return ResourceExhausted("too many calls are open; this one was the oldest", retry_after_s=BUSY_RETRY_AFTER_S)


def address_of_peer(peer: str) -> str:
    """The IP address of gRPC's `ipv4:ADDRESS:PORT` or `ipv6:[ADDRESS]:PORT`; else all of it."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer
