"""The small parts of `fanlight up`: pauses, logs, the lock, addresses, extras."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from fanlight.cli import service_plan
from fanlight.cli.main import run
from fanlight.cli.service_plan import WAIT_S, Addresses, DataInUse, LogFile, locked
from fanlight.cli.session import MissingExtra
from fanlight.cli.supervisor import RestartBackoff
from fanlight.cli.up import OWN_INVITE, all_registered, introduced
from fanlight.errors import InvalidInput
from fanlight.gateway.v1 import gateway_pb2 as pb
from fanlight.nodes.v1.nodes_pb2 import CreateInviteResponse, Invite
from tests.fakes.job_service import FakeJobService, serving

ROOT = Path(__file__).parents[3]


def test_the_pauses_double_up_to_half_a_minute():
    backoff = RestartBackoff()

    assert [backoff.delay_s(0.1) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]


def test_a_minute_of_health_resets_the_back_off():
    backoff = RestartBackoff()
    for _ in range(5):
        backoff.delay_s(0.1)

    assert backoff.delay_s(60) == 1
    assert backoff.delay_s(59.9) == 2


@pytest.fixture
def log(tmp_path):
    return LogFile(tmp_path / "logs" / "x.log", limit_bytes=100)


def test_the_last_line_is_one_since_the_start(log):
    with log.open() as file:
        file.write(b"old words\n")
    since_bytes = log.size_bytes()

    assert log.last_line(since_bytes=since_bytes) == ""
    with log.open() as file:
        file.write("first\nerror: läst\n\n".encode())
    assert log.last_line(since_bytes=since_bytes) == "error: läst"


def test_a_log_that_grew_too_large_is_moved_aside_under_its_writer(log):
    with log.open() as file:
        file.write(b"x" * 101)
        file.flush()
        log.trim()
        file.write(b"new")

    assert log.path.read_bytes() == b"new"
    assert log.path.with_suffix(".log.1").read_bytes() == b"x" * 101


async def test_a_follower_gets_whole_lines_only(log):
    heard = []
    writes = [b"one\ntw", b"", b"o\n"]

    async def sleep(delay_s):
        if not writes:
            raise asyncio.CancelledError
        with log.open() as file:
            file.write(writes.pop(0))

    with pytest.raises(asyncio.CancelledError):
        await log.follow(heard.append, sleep=sleep)

    assert heard == ["one", "two"]


def test_a_folder_is_locked_while_its_owner_lives(tmp_path):
    with locked(tmp_path), pytest.raises(DataInUse, match=f"process {os.getpid()}"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_lock_that_only_children_hold_is_waited_for(tmp_path):
    """The child has the lock from its parent, whose number in the file belongs to no process any more."""
    now_s = [0.0]
    with locked(tmp_path) as descriptor:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    (tmp_path / "up.lock").write_text(str(2**22 + 1))

    def sleep(delay_s):
        now_s[0] += 5
        if now_s[0] == WAIT_S - 5:
            child.communicate(b"\n")

    with locked(tmp_path, clock=lambda: now_s[0], sleep=sleep):
        assert now_s[0] == WAIT_S - 5


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(InvalidInput, match="file/data: cannot be used"), locked(tmp_path / "file" / "data"):
        pass


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("0.0.0.0:5", "127.0.0.1:5"),
        ("[::]:5", "[::1]:5"),
        ("127.0.0.1:5", "127.0.0.1:5"),
        ("localhost:5", "localhost:5"),
    ],
)
def test_workers_find_a_gateway_that_listens_everywhere(address, local):
    assert Addresses(http="", grpc=address).local_grpc == local


@pytest.mark.parametrize(("said", "grace_s"), [("2.5", 2.5), ("soon", 10.0), ("", 10.0)])
def test_a_grace_that_is_no_number_is_left_for_the_services_to_refuse(said, grace_s):
    environ = service_plan.environ_of_all(3, {"FANLIGHT_DRAIN_GRACE_S": said})

    assert environ["FANLIGHT_DRAIN_GRACE_S"] == said
    assert service_plan.grace_s(environ) == grace_s


def test_missing_extras_are_named_together(monkeypatch):
    monkeypatch.setattr(service_plan, "find_spec", lambda name: None if name in ("torch", "cv2") else object())

    with pytest.raises(MissingExtra, match=r"needs cv2, .*pip install 'fanlight\[preprocessor,diffusion\]'"):
        service_plan.require_extras()


@pytest.mark.parametrize("service", ["gateway", "preprocessor", "diffusion"])
def test_what_a_service_is_looked_for_by_comes_with_its_extra(service):
    distributions, brought = packages_distributions(), brought_by(service)

    for need in service_plan._NEEDS[service]:
        assert brought.intersection(name.replace("_", "-") for name in distributions[need]), need


def brought_by(extra):
    """Names of distributions, those of the extras that an extra takes in with them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = set()
    for line in extras[extra]:
        name, _, within = line.partition("[")
        found |= set().union(*map(brought_by, within[:-1].split(","))) if within else {re.split("[>=]", name)[0]}
    return found


async def test_it_is_ready_once_a_live_worker_of_each_stage_is_known():
    class Growing(FakeJobService):
        async def ListWorkers(self, request, context):
            answer = await super().ListWorkers(request, context)
            asked = len(self.requests["ListWorkers"])
            answer.workers[1].live = asked > 2
            return pb.ListWorkersResponse(workers=answer.workers[: min(asked, 2)])

    async def no_time(delay_s):
        pass

    service = Growing()
    async with serving(service) as address:
        await all_registered(Addresses(http="", grpc=address), sleep=no_time)

    assert len(service.requests["ListWorkers"]) == 3


HERE = Addresses(http="127.0.0.1:1", grpc="[::]:2")


def test_a_stage_of_up_gets_nothing_that_is_the_operators():
    environ = {
        "FANLIGHT_CLIENT_TOKEN": "operator",
        "FANLIGHT_TOKEN_FILE": "/token",
        "FANLIGHT_GATEWAY_WEBHOOK_SECRET": "whsec_",
        "FANLIGHT_GATEWAY_BLOBS": "s3://blobs",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_SESSION_TOKEN": "token",
        "AWS_SHARED_CREDENTIALS_FILE": "/aws",
        "AWS_CA_BUNDLE": "/bundle.pem",
        "FANLIGHT_WORKER_TOKEN": "worker",
        "FANLIGHT_TLS_CA_FILE": "/ca.pem",
        "FANLIGHT_DIFFUSION_MODELS": "/models",
        "PATH": "/bin",
    }

    given = {name for name in environ if service_plan.is_for_stages(name, environ)}

    assert given == {
        "FANLIGHT_WORKER_TOKEN",
        "FANLIGHT_TLS_CA_FILE",
        "FANLIGHT_DIFFUSION_MODELS",
        "AWS_CA_BUNDLE",
        "PATH",
    }


@pytest.mark.parametrize(
    "setting", [{"FANLIGHT_WEIGHTS_MIRRORS": "s3://weights"}, {"FANLIGHT_WEIGHTS_S3_REGION": "eu-west-1"}]
)
def test_a_stage_gets_keys_for_s3_where_its_weights_come_from_there(setting):
    assert service_plan.is_for_stages("AWS_SECRET_ACCESS_KEY", setting)


def test_where_the_gateway_has_a_token_direct_calls_to_a_stage_need_one_that_is_not_it():
    given = service_plan.environ_of_stage("diffusion", HERE, {"FANLIGHT_CLIENT_TOKEN": "operator"})

    assert len(given["FANLIGHT_WORKER_DIRECT_TOKEN"]) >= 32
    assert "operator" not in given.values()
    own = {"FANLIGHT_CLIENT_TOKEN": "operator", "FANLIGHT_WORKER_DIRECT_TOKEN": "direct"}
    assert "FANLIGHT_WORKER_DIRECT_TOKEN" not in service_plan.environ_of_stage("diffusion", HERE, own)
    assert "FANLIGHT_WORKER_DIRECT_TOKEN" not in service_plan.environ_of_stage("diffusion", HERE, {})


@pytest.mark.parametrize(
    ("grpc", "environ", "expected"),
    [
        ("127.0.0.1:1", {}, None),
        ("127.0.0.1:1", {"FANLIGHT_TLS_CA_FILE": "/ca.pem"}, None),
        ("0.0.0.0:1", {}, "/data/tls/authority.pem"),
        ("192.0.2.1:1", {"FANLIGHT_TLS_CA_FILE": "/ca.pem"}, "/data/tls/authority.pem"),
        ("0.0.0.0:1", {"FANLIGHT_PLAIN_TEXT": "true"}, None),
        ("127.0.0.1:1", {"FANLIGHT_TLS_CERT_FILE": "/c", "FANLIGHT_TLS_CA_FILE": "/ca.pem"}, "/ca.pem"),
    ],
)
def test_the_workers_of_up_trust_what_their_gateway_shows(grpc, environ, expected):
    found = service_plan.ca_file_of(Path("/data"), grpc, environ)
    assert found == (Path(expected) if expected else None)
    given = service_plan.environ_of_stage("diffusion", Addresses(http="", grpc=grpc, ca_file=found), environ)
    assert given["FANLIGHT_TLS_CA_FILE"] == (expected or "")


def test_the_workers_of_up_have_a_token_wherever_clients_need_one():
    assert "FANLIGHT_WORKER_TOKEN" not in service_plan.environ_of_all(3, {})
    made = service_plan.environ_of_all(3, {"FANLIGHT_CLIENT_TOKEN": "operator"})["FANLIGHT_WORKER_TOKEN"]
    assert len(made) >= 32
    for name in ("FANLIGHT_WORKER_TOKEN", "FANLIGHT_WORKER_TOKEN_FILE"):
        given = service_plan.environ_of_all(3, {"FANLIGHT_CLIENT_TOKEN": "operator", name: "own"})
        assert "FANLIGHT_WORKER_TOKEN" not in given


@pytest.mark.parametrize(
    ("grpc", "is_elsewhere"), [("127.0.0.1:1", False), ("0.0.0.0:1", False), ("[::]:1", False), ("192.0.2.1:1", True)]
)
async def test_the_workers_of_up_get_a_join_code_only_where_their_address_is_not_loopback(
    grpc, is_elsewhere, monkeypatch
):
    class Nodes:
        removed, made = [], []

        async def list_invites(self):
            return [Invite(id="old", comment=OWN_INVITE), Invite(id="other", comment="a friend's")]

        async def remove_invite(self, invite_id):
            self.removed.append(invite_id)

        async def invite(self, **fields):
            self.made.append(fields)
            return CreateInviteResponse(join_code="flj1")

    class Client:
        nodes = Nodes()

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

    monkeypatch.setattr("fanlight.cli.up.client_of", lambda addresses: Client())
    given = await introduced(Addresses(http="", grpc=grpc), Path("/data"))
    if is_elsewhere:
        assert given == {"FANLIGHT_WORKER_JOIN_CODE": "flj1", "FANLIGHT_WORKER_STATE_DIR": "/data/node"}
        assert Nodes.removed == ["old"]
    else:
        assert given == {}
        assert not Nodes.made


def test_up_does_not_start_where_its_workers_would_need_certificates(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FANLIGHT_TLS_CLIENT_CA_FILE", str(tmp_path / "ca.pem"))

    assert run(["up", "--data", str(tmp_path)]) == 1
    assert "no certificates for its own workers" in capsys.readouterr().err


def test_up_with_a_certificate_and_no_roots_says_what_to_set(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FANLIGHT_TLS_CERT_FILE", str(tmp_path / "cert.pem"))
    monkeypatch.delenv("FANLIGHT_TLS_CA_FILE", raising=False)

    assert run(["up", "--data", str(tmp_path)]) == 1
    assert "set FANLIGHT_TLS_CA_FILE too" in capsys.readouterr().err
