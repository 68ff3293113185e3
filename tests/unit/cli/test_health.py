from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fanlight.cli.main import run
from fanlight.health import Trust, main, own_address, own_trust


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


class Draining(health_pb2_grpc.HealthServicer):
    def Check(self, request, context):
        context.set_trailing_metadata((("fanlight-health", "draining"), ("fanlight-health-message", "it stops")))
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)


@pytest.fixture
def draining():
    """The address of a server of ours that drains; with TLS if credentials are given."""
    running = []

    def start(credentials=None):
        server = grpc.server(ThreadPoolExecutor(2))
        health_pb2_grpc.add_HealthServicer_to_server(Draining(), server)
        address = "127.0.0.1:0"
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        running.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in running:
        server.stop(None)


def test_the_state_of_a_server_of_ours_is_printed_with_its_reason(draining, capsys):
    address = draining()
    assert main([address, "--service", "readiness"]) == 1
    assert capsys.readouterr().err == f"{address}: not serving (draining: it stops)\n"


def test_the_command_line_has_it_too(draining, capsys):
    address = draining()
    assert run(["health", address, "--service", "readiness"]) == 1
    assert capsys.readouterr().err == f"{address}: not serving (draining: it stops)\n"


@pytest.fixture
def files(tmp_path):
    """Settings with a certificate for another name than the one that is dialed, and the server's credentials."""
    authority = trustme.CA()
    issued = authority.issue_cert("*.example.org")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "roots.pem"))
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    settings = {
        "FANLIGHT_TLS_CERT_FILE": str(tmp_path / "cert.pem"),
        "FANLIGHT_TLS_KEY_FILE": str(tmp_path / "key.pem"),
    }
    roots = authority.cert_pem.bytes()
    return settings, {
        "tls": grpc.ssl_server_credentials([pair]),
        "mutual": grpc.ssl_server_credentials([pair], roots, require_client_auth=True),
    }


@pytest.mark.parametrize("kind", ["tls", "mutual"])
def test_the_own_server_is_known_by_its_certificate_whatever_its_name(draining, files, monkeypatch, capsys, kind):
    settings, credentials = files
    monkeypatch.setenv("FANLIGHT_GATEWAY_GRPC", draining(credentials[kind]))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 1
    assert "not serving (draining" in capsys.readouterr().err


def test_roots_for_the_gateway_do_not_make_a_worker_check_itself_by_tls(draining, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("FANLIGHT_GATEWAY_GRPC", raising=False)
    monkeypatch.setenv("FANLIGHT_DIFFUSION_GRPC", draining())
    monkeypatch.setenv("FANLIGHT_TLS_CA_FILE", str(tmp_path / "roots.pem"))
    assert main([]) == 1
    assert "not serving (draining" in capsys.readouterr().err


def test_a_server_for_health_alone_has_no_tls_though_the_worker_has_a_certificate(draining, files):
    assert own_trust(draining(), files[0]) == Trust()


def test_another_server_at_the_own_address_is_not_trusted(draining, files, monkeypatch, capsys):
    other = trustme.CA().issue_cert("localhost")
    pair = (other.private_key_pem.bytes(), other.cert_chain_pems[0].bytes())
    monkeypatch.setenv("FANLIGHT_GATEWAY_GRPC", draining(grpc.ssl_server_credentials([pair])))
    for name, value in files[0].items():
        monkeypatch.setenv(name, value)
    assert main([]) == 1
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_an_error_of_one_line(capsys):
    assert main(["127.0.0.1:1", "--ca-file", "none.pem"]) == 1
    assert "none.pem" in capsys.readouterr().err
