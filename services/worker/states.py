"""A worker's state of health, from its stage, its slots and its gateway. Knows no gRPC."""

from typing import Any

from services.kernel.health import HealthState
from services.worker.admission import Admission
from services.worker.device import DeviceState
from services.worker.joining import GatewayContact
from services.worker.ports import ReportsCondition, Stage, StageCondition

WARM = HealthState(name="warm", message="its models are loaded and a slot is free")
# It leases its next task by itself, and direct calls wait in line: no reason to take it out of service.
FULL = HealthState(name="full", message="all slots are busy")
LOADING = HealthState(name="loading", message="models are downloaded or loaded; tasks wait for them", is_ready=False)
JOINING = HealthState(name="joining", message="the gateway has not answered yet", is_ready=False)
REFUSED = HealthState(
    name="gateway_refuses", message="its settings and the gateway's do not fit; its log says which", is_ready=False
)
DEVICE_LOST = HealthState(
    name="device_lost",
    message="only a new process can use the device",
    is_alive=False,
    is_ready=False,
    is_serving=False,
)


class WorkerHealth:
    """`contact` is None for a worker without a gateway."""

    def __init__(
        self,
        stage: Stage[Any],
        admission: Admission,
        contact: GatewayContact | None,
        *,
        unreachable_after_s: float,
        device: DeviceState | None = None,
    ) -> None:
        self._device = device or DeviceState()
        self._stage = stage
        self._admission = admission
        self._contact = contact
        self._unreachable_after_s = unreachable_after_s

    async def state(self) -> HealthState:
        """The worst first. A gateway that is away makes a worker not ready and leaves it alive: it waits for it."""
        condition = self._stage.condition() if isinstance(self._stage, ReportsCondition) else StageCondition.WARM
        if condition is StageCondition.LOST or self._device.error is not None:
            return DEVICE_LOST
        if self._contact is not None and (state := self._state_of(self._contact)):
            return state
        if condition is StageCondition.LOADING:
            return LOADING
        return WARM if self._admission.free else FULL

    def _state_of(self, contact: GatewayContact) -> HealthState | None:
        """None while the gateway answers, or has not for a moment only."""
        if contact.obstacle is not None and contact.obstacle.is_final:
            return REFUSED
        if contact.silent_s >= self._unreachable_after_s:
            message = f"no answer from the gateway for {contact.silent_s:.0f} s"
            return HealthState(name="gateway_unreachable", message=message, is_ready=False)
        return None if contact.has_joined else JOINING
