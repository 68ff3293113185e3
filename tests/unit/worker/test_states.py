"""A worker's state of health, the worst first."""

import pytest

from fanlight.errors import Unauthenticated, Unavailable
from services.worker.admission import Admission
from services.worker.device import DeviceLost, DeviceState
from services.worker.joining import Credentials, GatewayContact
from services.worker.ports import StageCondition
from services.worker.retry import Env
from services.worker.states import WorkerHealth
from tests.fakes.stage import FakeStage


class ConditionedStage(FakeStage):
    def __init__(self) -> None:
        super().__init__()
        self.now = StageCondition.WARM

    def condition(self) -> StageCondition:
        return self.now


class Parts:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.stage = ConditionedStage()
        self.admission = Admission(slots=1, waiting_limit=1)
        env = Env(now_s=lambda: self.now_s)
        self.contact = GatewayContact("gw:1", Credentials(), env, refused_exit_s=1e9, refused_again_exit_s=1e9)
        self.health = WorkerHealth(self.stage, self.admission, self.contact, unreachable_after_s=120.0)

    async def told(self) -> tuple[str, bool, bool]:
        """The name, and whether it is alive and ready."""
        state = await self.health.state()
        return state.name, state.is_alive, state.is_ready


@pytest.fixture
def parts() -> Parts:
    return Parts()


async def test_a_worker_joins_loads_and_is_warm(parts: Parts) -> None:
    parts.stage.now = StageCondition.LOADING
    assert await parts.told() == ("joining", True, False)
    parts.contact.note_answer()
    assert await parts.told() == ("loading", True, False)
    parts.stage.now = StageCondition.WARM
    assert await parts.told() == ("warm", True, True)


async def test_a_full_worker_is_ready_and_says_that_it_is_full(parts: Parts) -> None:
    parts.contact.note_answer()
    (slot,) = parts.admission.take(1)
    assert await parts.told() == ("full", True, True)
    slot.release()
    assert await parts.told() == ("warm", True, True)


async def test_a_gateway_that_is_away_for_long_makes_it_not_ready_and_leaves_it_alive(parts: Parts) -> None:
    parts.contact.note_answer()
    await parts.contact.note_failure(Unavailable("Connection refused"))
    parts.now_s = 119.0
    assert await parts.told() == ("warm", True, True)
    parts.now_s = 120.0
    assert await parts.told() == ("gateway_unreachable", True, False)
    parts.contact.note_answer()
    assert await parts.told() == ("warm", True, True)


async def test_one_that_never_reached_its_gateway_says_so_too(parts: Parts) -> None:
    parts.now_s = 120.0
    assert await parts.told() == ("gateway_unreachable", True, False)


async def test_a_gateway_that_refuses_it_is_told_apart_from_one_that_is_away(parts: Parts) -> None:
    parts.now_s = 500.0
    await parts.contact.note_failure(Unauthenticated("wrong"))
    assert await parts.told() == ("gateway_refuses", True, False)


async def test_a_lost_device_needs_a_restart_whatever_else_is_wrong(parts: Parts) -> None:
    parts.now_s = 500.0
    parts.stage.now = StageCondition.LOST
    assert await parts.told() == ("device_lost", False, False)


async def test_a_device_that_hangs_needs_a_restart_of_any_stage() -> None:
    device = DeviceState()
    health = WorkerHealth(
        FakeStage(), Admission(slots=1, waiting_limit=1), None, unreachable_after_s=1.0, device=device
    )
    assert (await health.state()).name == "warm"
    device.lose(DeviceLost("it has hung"))
    assert (await health.state()).name == "device_lost"


async def test_a_worker_without_a_gateway_and_a_stage_without_conditions_is_warm() -> None:
    health = WorkerHealth(FakeStage(), Admission(slots=1, waiting_limit=1), None, unreachable_after_s=1.0)
    assert (await health.state()).name == "warm"


async def test_no_message_names_the_gateway(parts: Parts) -> None:
    await parts.contact.note_failure(Unauthenticated("wrong"))
    assert "gw:1" not in (await parts.health.state()).message
    parts.now_s = 500.0
    await parts.contact.note_failure(Unavailable("Connection refused"))
    state = await parts.health.state()
    assert state.name == "gateway_unreachable"
    assert "gw:1" not in state.message
    assert state.message.isascii()
