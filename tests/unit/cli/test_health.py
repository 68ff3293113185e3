from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fanlight.health import main, own_address


@pytest.fixture
def server():
    """A server's address and what it says of itself."""
    servicer = health.HealthServicer()
    running = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}", servicer
    running.stop(None)


def test_a_server_that_serves_is_healthy(server, capsys):
    address, servicer = server
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    assert main([address]) == 0
    assert capsys.readouterr().out == f"{address}: serving\n"


def test_a_server_that_drains_is_not(server, capsys):
    address, servicer = server
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert main([address]) == 1
    assert capsys.readouterr().err == f"{address}: not serving\n"


def test_one_of_its_services_can_be_asked_for(server):
    address, servicer = server
    servicer.set("a.b.C", health_pb2.HealthCheckResponse.SERVING)
    assert main([address, "--service", "a.b.C"]) == 0
    assert main([address, "--service", "nobody"]) == 1


def test_where_nobody_listens_it_says_so(capsys):
    assert main(["127.0.0.1:1", "--timeout-s", "5"]) == 1
    assert "unavailable" in capsys.readouterr().err


def test_the_address_is_that_of_the_service_whose_setting_is_there():
    assert own_address({"FANLIGHT_DIFFUSION_GRPC": "[::]:50053"}) == "localhost:50053"
    assert own_address({"FANLIGHT_GATEWAY_GRPC": "0.0.0.0:1"}) == "127.0.0.1:1"
    assert own_address({"FANLIGHT_GATEWAY_GRPC": "10.0.0.7:1"}) == "10.0.0.7:1"
    assert own_address({}) == ""


def test_without_an_address_it_asks_for_one(monkeypatch, capsys):
    monkeypatch.delenv("FANLIGHT_GATEWAY_GRPC", raising=False)
    with pytest.raises(SystemExit):
        main([])
    assert "HOST:PORT" in capsys.readouterr().err
