"""A worker that cannot join says why in one sentence and what to set, and ends where trying again cannot help."""

import asyncio
import functools
import http.server
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog.testing
import trustme

from fanlight.channel import open_channel
from fanlight.errors import DeadlineExceeded, FanlightError, InvalidField, Unauthenticated, Unavailable
from fanlight.queue.v1 import queue_pb2
from services.kernel.config import CommonSettings
from services.worker.joining import Credentials, GatewayContact, JoinRefused, Obstacle, look_at, obstacle_of
from services.worker.leases import QueueCalls
from services.worker.loop import WorkerSettings
from services.worker.retry import Env
from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage
from tests.fakes.worker import task_named, working

ANSWERS_HTTP = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/nonexistent")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def roots(authority: trustme.CA, tmp_path: Path) -> Path:
    authority.cert_pem.write_to_path(str(tmp_path / "roots.pem"))
    return tmp_path / "roots.pem"


@pytest.fixture
def other_roots(tmp_path: Path) -> Path:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    return tmp_path / "other.pem"


def credentials_of(authority: trustme.CA, name: str, *, mutual: bool = False) -> grpc.ServerCredentials:
    issued = authority.issue_cert(name)
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    return grpc.ssl_server_credentials([pair], authority.cert_pem.bytes() if mutual else None, mutual)


@pytest.fixture
def http_port(authority: trustme.CA) -> Iterator[Any]:
    servers = []

    def start(*, tls: bool = False) -> int:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ANSWERS_HTTP)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("127.0.0.1").configure_cert(context)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return int(server.server_port)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


async def obstacle_at(
    address: str, *, token: str = "", ca_file: Path | None = None, certificate: tuple[Path, Path] | None = None
) -> Obstacle:
    """What a worker with these settings finds in its way."""
    has = Credentials(has_token=bool(token), uses_tls=ca_file is not None, has_certificate=certificate is not None)
    async with open_channel(address, token=token, ca_file=ca_file, certificate=certificate) as channel:
        with pytest.raises(FanlightError) as raised:
            await QueueCalls(channel).lease(queue_pb2.LeaseTasksRequest())
    return obstacle_of(raised.value, gateway=address, credentials=has) or await look_at(address, has)


def says(obstacle: Obstacle, reason: str, *words: str, is_final: bool) -> bool:
    assert (obstacle.reason, obstacle.is_final) == (reason, is_final), obstacle
    assert "\n" not in obstacle.advice
    assert all(word in obstacle.advice for word in words), obstacle.advice
    return True


@pytest.mark.parametrize(("token", "words"), [("", "asks for a credential"), ("clients", "refuses this worker's")])
async def test_a_wrong_or_missing_token(token: str, words: str) -> None:
    async with FakeGateway(token="workers") as gateway:
        obstacle = await obstacle_at(gateway.address, token=token)
    assert says(obstacle, "token_refused", words, "FANLIGHT_WORKER_TOKEN", is_final=True)


async def test_a_gateway_with_tls_and_a_worker_without(authority: trustme.CA) -> None:
    async with FakeGateway(credentials=credentials_of(authority, "127.0.0.1")) as gateway:
        obstacle = await obstacle_at(gateway.address)
    assert says(obstacle, "tls_needed", "set FANLIGHT_TLS_CA_FILE", is_final=True)


async def test_a_worker_with_tls_and_a_gateway_without(roots: Path) -> None:
    async with FakeGateway() as gateway:
        obstacle = await obstacle_at(gateway.address, ca_file=roots)
    assert says(obstacle, "no_tls_there", "unset FANLIGHT_TLS_CA_FILE", "FANLIGHT_TLS_CERT_FILE", is_final=True)


async def test_roots_that_did_not_sign_the_gateways_certificate(authority: trustme.CA, other_roots: Path) -> None:
    async with FakeGateway(credentials=credentials_of(authority, "127.0.0.1")) as gateway:
        obstacle = await obstacle_at(gateway.address, ca_file=other_roots)
    assert says(obstacle, "certificate_not_trusted", "FANLIGHT_TLS_CA_FILE", is_final=True)


async def test_a_certificate_for_another_name(authority: trustme.CA, roots: Path) -> None:
    async with FakeGateway(credentials=credentials_of(authority, "gateway.example.org")) as gateway:
        obstacle = await obstacle_at(gateway.address, ca_file=roots)
    assert says(obstacle, "certificate_of_another_name", "FANLIGHT_WORKER_GATEWAY", is_final=True)


async def test_a_gateway_that_asks_for_a_certificate(authority: trustme.CA, roots: Path) -> None:
    async with FakeGateway(credentials=credentials_of(authority, "127.0.0.1", mutual=True)) as gateway:
        obstacle = await obstacle_at(gateway.address, ca_file=roots)
    assert says(obstacle, "certificate_needed", "FANLIGHT_TLS_CERT_FILE", "FANLIGHT_TLS_KEY_FILE", is_final=True)


async def test_with_a_certificate_a_worker_joins_a_gateway_that_asks_for_one(
    authority: trustme.CA, roots: Path, tmp_path: Path
) -> None:
    issued = authority.issue_cert("node-1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    files = {"tls_ca_file": roots, "tls_cert_file": tmp_path / "cert", "tls_key_file": tmp_path / "key"}
    async with FakeGateway(credentials=credentials_of(authority, "127.0.0.1", mutual=True)) as gateway:
        await gateway.offer(task_named("jobs/a/tasks/1"))
        async with working(gateway, FakeStage(), common=files):
            await gateway.until(lambda: gateway.results["jobs/a/tasks/1"] == 1)


async def test_an_address_for_http(http_port: Any) -> None:
    obstacle = await obstacle_at(f"127.0.0.1:{http_port()}")
    assert says(obstacle, "not_grpc", "gRPC address", "FANLIGHT_WORKER_GATEWAY", is_final=True)


async def test_an_address_for_https(http_port: Any, roots: Path) -> None:
    obstacle = await obstacle_at(f"127.0.0.1:{http_port(tls=True)}", ca_file=roots)
    assert says(obstacle, "not_grpc", "gRPC address", "FANLIGHT_WORKER_GATEWAY", is_final=True)


@pytest.fixture
async def other_server() -> AsyncIterator[str]:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_a_grpc_server_that_is_no_gateway(other_server: str) -> None:
    obstacle = await obstacle_at(other_server)
    assert says(obstacle, "not_a_gateway", "FANLIGHT_WORKER_GATEWAY", "version", is_final=True)


async def test_a_port_where_nobody_listens_may_get_a_gateway_later() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        obstacle = await obstacle_at(f"127.0.0.1:{unused.getsockname()[1]}")
    assert says(obstacle, "nobody_listens", "start the gateway", "FANLIGHT_WORKER_GATEWAY", is_final=False)


async def test_a_name_that_is_not_found_may_be_found_later() -> None:
    obstacle = await obstacle_at("gateway.invalid:50051")
    assert says(obstacle, "name_not_found", "gateway.invalid", "DNS", is_final=False)


async def test_a_peer_that_ends_the_connection_at_once() -> None:
    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(end, "127.0.0.1", 0) as server:
        obstacle = await obstacle_at(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert says(obstacle, "connection_closed", "FANLIGHT_WORKER_GATEWAY", is_final=False)


@pytest.mark.parametrize(
    ("error", "reason", "is_final"),
    [
        (DeadlineExceeded("Deadline Exceeded"), "no_answer", False),
        (Unavailable("Received http2 header with status: 502"), "proxy_without_gateway", False),
        (Unavailable("last error: HTTP proxy returned response code 403"), "proxy_refuses", False),
        (Unavailable("the store does not answer"), "unavailable", False),
        (InvalidField("is too long", field="worker.id"), "report_refused", True),
    ],
)
def test_other_errors_are_told_apart(error: FanlightError, reason: str, is_final: bool) -> None:
    obstacle = obstacle_of(error, gateway="gateway:50051", credentials=Credentials())
    assert obstacle is not None
    assert says(obstacle, reason, "gateway:50051", is_final=is_final)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0


def contact_at(clock: Clock) -> GatewayContact:
    env = Env(now_s=lambda: clock.now_s)
    return GatewayContact("gw:1", Credentials(), env, refused_exit_s=10.0, refused_again_exit_s=600.0)


async def fail_until(contact: GatewayContact, clock: Clock, error: FanlightError, end_s: float) -> None:
    """Every second."""
    while clock.now_s < end_s:
        await contact.note_failure(error)
        clock.now_s += 1.0


async def test_it_tries_for_a_while_and_then_ends_with_the_code_for_wrong_configuration() -> None:
    clock = Clock()
    contact = contact_at(clock)
    await fail_until(contact, clock, Unauthenticated("wrong"), 10.0)
    with pytest.raises(JoinRefused, match=r"^cannot join: the gateway at gw:1 asks for a credential: set FANLIGHT"):
        await contact.note_failure(Unauthenticated("wrong"))
    assert JoinRefused.exit_code == 78


async def test_after_it_had_joined_it_tries_for_longer() -> None:
    clock = Clock()
    contact = contact_at(clock)
    contact.note_answer()
    await fail_until(contact, clock, Unauthenticated("wrong"), 600.0)
    with pytest.raises(JoinRefused):
        await contact.note_failure(Unauthenticated("wrong"))


async def test_a_gateway_that_is_only_away_never_ends_it() -> None:
    clock = Clock()
    contact = contact_at(clock)
    await fail_until(contact, clock, Unavailable("Connection refused"), 5_000.0)
    # Nor do a few refusals between.
    for _ in range(20):
        await fail_until(contact, clock, Unauthenticated("wrong"), clock.now_s + 9)
        await contact.note_failure(Unavailable("Connection refused"))


async def test_a_failure_is_logged_once_and_then_each_minute() -> None:
    clock = Clock()
    contact = contact_at(clock)
    with structlog.testing.capture_logs() as logs:
        await fail_until(contact, clock, Unavailable("Connection refused"), 181.0)
        contact.note_answer()
        await contact.note_failure(Unavailable("Connection refused"))
    events = [each["event"] for each in logs]
    assert events == ["poll_failed"] * 4 + ["gateway_joined", "poll_failed"]
    assert logs[0]["error"].startswith("nobody listens at gw:1")


async def test_a_worker_with_a_wrong_token_ends() -> None:
    async with FakeGateway(token="workers") as gateway:
        with pytest.raises(ExceptionGroup) as raised:
            async with working(gateway, FakeStage(), token="clients", limits={"refused_exit_s": 0.05}) as worker:
                await worker.task
    assert raised.group_contains(JoinRefused)


def test_a_workers_own_settings_have_no_token_of_the_operator() -> None:
    names = {*CommonSettings.model_fields, *WorkerSettings.model_fields}
    assert not {name for name in names if "client_token" in name}
