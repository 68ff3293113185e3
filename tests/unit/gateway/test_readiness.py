"""What a gateway's gRPC health says: the same as `/readyz`, and alive whatever its store does."""

import pytest

from fanlight.errors import Unavailable
from services.gateway.__main__ import _health_of, _require_tokens
from services.gateway.config import GatewaySettings
from services.kernel.config import GatewayCommonSettings, SettingsError
from tests.fakes.gateway import FakeGateway


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


async def test_a_gateway_that_can_work_is_ready(gateway: FakeGateway) -> None:
    state = await _health_of(gateway)
    assert (state.name, state.is_ready, state.is_alive) == ("ready", True, True)


async def test_a_gateway_whose_store_fails_is_alive_and_tells_no_stranger_where_it_is(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise Unavailable("nats://10.0.0.1:4222 is away")

    monkeypatch.setattr(gateway.probe, "write", fail)
    state = await _health_of(gateway)
    assert (state.name, state.is_ready, state.is_alive) == ("store_unavailable", False, True)
    assert "10.0.0.1" not in state.message


def test_one_token_for_clients_and_nodes_is_refused() -> None:
    common = GatewayCommonSettings(client_token="same", worker_token="same")
    with pytest.raises(SettingsError, match=r"FANLIGHT_WORKER_TOKEN: must be another one"):
        _require_tokens(GatewaySettings(), common)
