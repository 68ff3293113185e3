"""The standard health service, `grpc.health.v1`: the states of a process, and what each means for a probe.

`startup`, `liveness` and `readiness` are services of their own, so that a probe can name what it asks. The trailing
metadata of Check has the state's name and a sentence about it. Knows no stage and no gateway.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fanlight.errors import NotFound
from services.kernel.logs import get_logger

log = get_logger()

STARTUP, LIVENESS, READINESS = "startup", "liveness", "readiness"
# Keys of the trailing metadata; fanlight/health.py reads them.
STATE_KEY, MESSAGE_KEY = "fanlight-health", "fanlight-health-message"
# How often the state is looked at, for those who watch and for the log.
LOOK_EVERY_S = 1.0

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthState:
    """A state by name. `message`: printable ASCII; strangers may read it, so it names no address and no file."""

    name: str
    message: str = ""
    # `startup`: it runs. Loading and downloads may continue, so that no platform kills a node that downloads.
    has_started: bool = True
    # `liveness`: a restart would not help.
    is_alive: bool = True
    # `readiness`: it can work now.
    is_ready: bool = True
    # "" and the services by their full names: calls are answered.
    is_serving: bool = True


STARTING = HealthState(
    name="starting", message="it does not answer calls yet", has_started=False, is_ready=False, is_serving=False
)
READY = HealthState(name="ready")
DRAINING = HealthState(
    name="draining", message="it stops once the running work has ended", is_ready=False, is_serving=False
)

# Returns the present state, without raising. Nobody waits for it but `HealthService.run`.
GetState = Callable[[], Awaitable[HealthState]]


async def always_ready() -> HealthState:
    return READY


class HealthService(health_pb2_grpc.HealthServicer):
    """STARTING until `open`, then what `get_state` returned last, and DRAINING from `drain` on, if it is alive.

    `names`: the full names of the server's services. For one event loop.
    """

    def __init__(
        self,
        names: Sequence[str],
        get_state: GetState = always_ready,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._names = ("", STARTUP, LIVENESS, READINESS, *names)
        self._get_state = get_state
        self._sleep = sleep
        self._is_open = False
        self._is_draining = False
        self._is_closed = False
        self._state = STARTING
        # Set, and replaced, with each change of the state.
        self._changed = asyncio.Event()

    async def open(self, is_open: bool = True) -> None:
        self._is_open = is_open
        await self.look()

    async def drain(self) -> None:
        self._is_draining = True
        await self.look()

    async def close(self) -> None:
        """End all streams of Watch, each after its last message: a stopping server would wait for them."""
        await self.drain()
        self._is_closed = True
        self._notify()

    async def run(self) -> None:
        """Look at the state until cancelled, so that watchers and the log learn of changes."""
        while True:
            await self.look()
            await self._sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Take the present state; if it is another one, it is logged and the watchers are told."""
        state = await self._get_state() if self._is_open and not self._is_draining else STARTING
        if self._is_draining:
            # What a restart would help stays so while it drains.
            state = DRAINING if self._state.is_alive else self._state
        before, self._state = self._state, state
        if state.name != before.name:
            log.info("health_changed", state=state.name, message=state.message, ready=state.is_ready)
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        state, status = self._state, self._status(request.service)
        if status == _UNKNOWN:
            raise NotFound(f"has no such service; it has {_listed(self._names)}", field="service")
        context.set_trailing_metadata(((STATE_KEY, state.name), (MESSAGE_KEY, state.message)))
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in self._names}
        # The type stubs are older than this method.
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        sent = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            if self._is_closed:
                return
            # A change during the yield has replaced the event and set the one we have.
            await changed.wait()

    def _status(self, service: str) -> int:
        state = self._state
        if service not in self._names:
            return _UNKNOWN
        is_true = {STARTUP: state.has_started, LIVENESS: state.is_alive, READINESS: state.is_ready}
        return _SERVING if is_true.get(service, state.is_serving) else _NOT_SERVING


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name or '""' for name in names)
