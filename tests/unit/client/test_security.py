"""What is dialed with TLS, what in plain text, whom a client trusts, and the certificate that it shows."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

from fanlight.channel import Security, open_channel, read_roots, security_of, system_roots
from fanlight.cli.main import run
from fanlight.client import AsyncClient
from fanlight.errors import CallFailed, InvalidInput, advice
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc


class Jobs(gateway_pb2_grpc.JobServiceServicer):
    def __init__(self) -> None:
        self.tokens: list[str] = []

    async def ListWorkers(self, request: Any, context: Any) -> gateway_pb2.ListWorkersResponse:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))
        return gateway_pb2.ListWorkersResponse()


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials | None, jobs: Jobs | None = None) -> AsyncIterator[str]:
    server = grpc.aio.server()
    gateway_pb2_grpc.add_JobServiceServicer_to_server(jobs or Jobs(), server)
    listen = "127.0.0.1:0"
    port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_credentials(authority: trustme.CA, *, asks: bool = False) -> grpc.ServerCredentials:
    certificate = authority.issue_cert("127.0.0.1")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    roots = authority.cert_pem.bytes() if asks else None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=asks)


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Roots, and a client's certificate and key."""
    mine = authority.issue_cert("me", organization_unit_name="client")
    paths = (tmp_path / "ca.pem", tmp_path / "me.pem", tmp_path / "me.key")
    for path, pem in zip(paths, (authority.cert_pem, mine.cert_chain_pems[0], mine.private_key_pem), strict=True):
        path.write_bytes(pem.bytes())
    return paths


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.0.0.2:1", "127.0.0.1:1,127.0.0.1:2"])
def test_loopback_is_called_in_plain_text(address: str) -> None:
    assert security_of(address).is_plain_text


@pytest.mark.parametrize("address", ["10.0.0.1:1", "gateway:1", "example.org:443", "127.0.0.1:1,10.0.0.1:1", "[::]:1"])
def test_everything_else_is_called_with_tls_unless_plain_text_is_asked_for(address: str) -> None:
    assert not security_of(address).is_plain_text
    assert security_of(address, plain_text=True).is_plain_text


def test_a_file_of_roots_means_tls_everywhere(files: tuple[Path, Path, Path]) -> None:
    for address in ("127.0.0.1:1", "10.0.0.1:1"):
        found = security_of(address, ca_file=files[0], plain_text=True)
        assert found == Security(roots=files[0].read_bytes())


def test_the_systems_roots_are_those_of_ssl_cert_file_where_it_is_set(files: tuple[Path, Path, Path]) -> None:
    assert system_roots({"SSL_CERT_FILE": str(files[0])}) == files[0].read_bytes()
    with pytest.raises(ValueError, match="no PEM certificates"):
        read_roots(files[2])
    with pytest.raises(OSError, match="No such file"):
        system_roots({"SSL_CERT_FILE": str(files[0].with_name("absent"))})


async def test_a_token_that_changes_is_asked_for_at_each_call() -> None:
    jobs, fresh = Jobs(), iter(["one", "", "two"])
    async with serving(None, jobs) as address, open_channel(address, token=lambda: next(fresh)) as channel:
        for _ in range(3):
            await gateway_pb2_grpc.JobServiceStub(channel).ListWorkers(gateway_pb2.ListWorkersRequest(), timeout=10)
    assert jobs.tokens == ["bearer one", "", "bearer two"]


async def test_a_client_shows_its_certificate_to_a_gateway_that_asks(
    authority: trustme.CA, files: tuple[Path, Path, Path]
) -> None:
    roots, chain, key = files
    async with serving(server_credentials(authority, asks=True)) as address:
        async with AsyncClient(address, ca_file=roots, certificate=(chain, key)) as client:
            assert await client.list_workers() == []
        async with AsyncClient(address, ca_file=roots, connect_s=0.1, timeout_s=5) as client:
            with pytest.raises(CallFailed):
                await client.list_workers()


async def test_the_commands_say_what_is_wrong_with_tls(authority: trustme.CA, files: tuple[Path, Path, Path]) -> None:
    other = trustme.CA()
    files[0].write_bytes(other.cert_pem.bytes())
    for credentials, words in ((server_credentials(authority), "is not trusted here"), (None, "does not speak TLS")):
        options: dict[str, Any] = {"ca_file": files[0], "connect_s": 0.1, "timeout_s": 5.0}
        async with serving(credentials) as address, AsyncClient(address, **options) as client:
            with pytest.raises(CallFailed) as raised:
                await client.list_workers()
        assert words in advice(raised.value, gateway=address)


async def test_bad_files_are_named(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ca_file": tmp_path / "absent"}, "absent: cannot be read"),
        ({"ca_file": files[2]}, "no PEM certificates"),
        ({"certificate": (files[1], tmp_path / "absent")}, "absent: cannot be read"),
    ]
    for options, words in wrong:
        with pytest.raises(InvalidInput, match=words):
            AsyncClient("10.0.0.1:1", **options)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"FANLIGHT_PLAIN_TEXT": "maybe"}, "FANLIGHT_PLAIN_TEXT: must be true or false"),
        ({"FANLIGHT_TLS_CERT_FILE": "/x"}, "go together"),
        ({"FANLIGHT_PLAIN_TEXT": "true"}, "warning: FANLIGHT_PLAIN_TEXT is set"),
    ],
)
def test_a_command_warns_of_plain_text_and_takes_whole_pairs_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environ: dict[str, str], words: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # Not a port: nothing is dialed.
    assert run(["workers", "--gateway", "gateway:x"]) != 0
    assert words in capsys.readouterr().err
