"""A node joins a gateway over TLS that the gateway made itself, and keeps its credential fresh."""

import asyncio
import datetime
import json
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from fanlight.contract.join_code import OWN_NAME, JoinCode, parse_join_code
from fanlight.errors import Unauthenticated, Unavailable
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from services.gateway.adapters.certificates import CertificateFiles, authority_digest, own_certificate
from services.gateway.app.tenants import callers_of
from services.gateway.rpc.nodes import JoinAddress, NodeService
from services.kernel.grpc_guards import ErrorInterceptor
from services.worker.identity import CodeProof, CredentialFile, NodeIdentity, Trust
from services.worker.pinning import pinned_roots
from services.worker.retry import Env
from tests.fakes.fleet import Fleet
from tests.fakes.proxy import FakeProxy

OPERATOR = "operator-token"


class Door:
    """NodeService of a fleet's gateway behind TLS."""

    def __init__(self, address: str, files: CertificateFiles, fleet: Fleet) -> None:
        self.address, self.files, self.fleet = address, files, fleet

    async def invite(self, **fields: Any) -> JoinCode:
        channel = open_channel(self.address, Trust(roots=self.files.authority.read_bytes(), name=OWN_NAME))
        async with channel:
            answer = await nodes_pb2_grpc.NodeServiceStub(channel).CreateInvite(
                nodes_pb2.CreateInviteRequest(**fields), metadata=(("authorization", f"bearer {OPERATOR}"),)
            )
        return parse_join_code(answer.join_code)

    def identity(self, code: JoinCode, folder: Path, wall_s: Callable[[], float] | None = None) -> NodeIdentity:
        return NodeIdentity(
            CodeProof(code),
            CredentialFile(folder, asyncio.sleep),
            find_trust=lambda: Trust(roots=pinned_roots(code.gateway, code.authority), name=OWN_NAME),
            open_channel=lambda trust: open_channel(code.gateway, trust),
            name="box",
            env=Env(),
            wall_s=wall_s or (lambda: 1_000_000.0),
        )


def open_channel(address: str, trust: Trust) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(trust.roots),
        options=[("grpc.ssl_target_name_override", trust.name)],
    )


@asynccontextmanager
async def served(fleet: Fleet, files: CertificateFiles) -> AsyncIterator[Door]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    chain = files.chain.read_bytes()
    credentials = grpc.ssl_server_credentials([(files.key.read_bytes(), chain)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    address = JoinAddress(gateway=f"127.0.0.1:{port}", authority=authority_digest(chain), is_own=True)
    service = NodeService(fleet.gateway, callers_of(OPERATOR, ()), fleet.clock, address, None)
    nodes_pb2_grpc.add_NodeServiceServicer_to_server(service, server)
    await server.start()
    try:
        yield Door(f"127.0.0.1:{port}", files, fleet)
    finally:
        await server.stop(None)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as running:
        yield running


@pytest.fixture
async def door(fleet: Fleet, tmp_path: Path) -> AsyncIterator[Door]:
    files = own_certificate(tmp_path, [], now=datetime.datetime.now(datetime.UTC))
    async with served(fleet, files) as door:
        yield door


async def test_a_node_joins_with_nothing_but_its_code_and_is_the_same_node_after_a_restart(
    door: Door, tmp_path: Path
) -> None:
    code = await door.invite()
    identity = door.identity(code, tmp_path / "state")
    await identity.establish()
    assert door.fleet.gateway.nodes.of_credential(identity.token())
    again = door.identity(code, tmp_path / "state")
    await again.establish()
    assert (again.node_id, again.token()) == (identity.node_id, identity.token())
    assert stat.S_IMODE((tmp_path / "state" / "node.json").stat().st_mode) == 0o600
    with pytest.raises(Unauthenticated, match="used up"):
        await door.identity(code, tmp_path / "elsewhere").establish()


async def test_a_node_does_not_join_another_gateway_at_the_same_address(
    door: Door, fleet: Fleet, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    files = own_certificate(other, [], now=datetime.datetime.now(datetime.UTC))
    code = await door.invite()
    async with served(fleet, files) as impostor:
        lured = replace(code, gateway=impostor.address)
        with pytest.raises(Unauthenticated, match="another certificate"):
            await impostor.identity(lured, tmp_path / "state").establish()


async def test_a_gateway_in_plain_text_and_one_that_is_away_are_told_apart(door: Door, tmp_path: Path) -> None:
    code = await door.invite()
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    plain = replace(code, gateway=f"127.0.0.1:{port}")
    with pytest.raises(Unauthenticated, match="does not speak TLS"):
        await door.identity(plain, tmp_path / "state").establish()
    await server.stop(None)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await door.identity(plain, tmp_path / "state").establish()


async def test_two_workers_of_one_machine_share_a_credential_and_renew_it_once(door: Door, tmp_path: Path) -> None:
    now_s = 1_000_000.0
    code = await door.invite()
    first, second = (door.identity(code, tmp_path / "state", lambda: now_s) for _ in range(2))
    await asyncio.gather(first.establish(), second.establish())
    assert first.token() == second.token()
    before = first.token()
    now_s += 4 * 3_600.0
    await first.renew_if_due()
    await second.renew_if_due()
    assert first.token() == second.token() != before
    assert door.fleet.gateway.nodes.of_credential(first.token())


async def test_a_revoked_node_cannot_renew(door: Door, tmp_path: Path) -> None:
    now_s = 1_000_000.0
    identity = door.identity(await door.invite(), tmp_path / "state", lambda: now_s)
    await identity.establish()
    await door.fleet.gateway.revoke_node(identity.node_id, "it lied")
    assert door.fleet.gateway.nodes.of_credential(identity.token()) is None
    now_s += 4 * 3_600.0
    with pytest.raises(Unauthenticated, match="revoked"):
        await identity.renew_if_due()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"stages": 3}', "\x00" * 10, json.dumps({"stages": [], "x": 1})])
async def test_a_damaged_credential_file_makes_the_node_join_again(door: Door, tmp_path: Path, content: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "node.json").write_text(content)
    identity = door.identity(await door.invite(), state)
    await identity.establish()
    assert door.fleet.gateway.nodes.of_credential(identity.token())


async def test_a_state_folder_that_cannot_be_written_is_named(door: Door, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = tmp_path / "file" / "state"
    with pytest.raises(Unavailable, match="FANLIGHT_WORKER_STATE_DIR"):
        await door.identity(await door.invite(), state).establish()


async def test_only_an_operator_invites(door: Door) -> None:
    channel = open_channel(door.address, Trust(roots=door.files.authority.read_bytes(), name=OWN_NAME))
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError, match="right token"):
            await nodes_pb2_grpc.NodeServiceStub(channel).CreateInvite(nodes_pb2.CreateInviteRequest())


async def test_a_node_behind_a_proxy_finds_its_gateway_through_it(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fanlight.proxies._resolved", lambda name: [])
    code = replace(await door.invite(), gateway="gateway.example:50051")
    with FakeProxy(login="me:secret") as proxy:
        proxy.lead("gateway.example", f"http://{door.address}")
        monkeypatch.setenv("https_proxy", proxy.url())
        roots = await asyncio.to_thread(pinned_roots, code.gateway, code.authority)
        assert proxy.asked == ["gateway.example:50051"]
    assert roots == door.files.authority.read_bytes()


async def test_a_proxy_that_refuses_is_told_from_a_gateway_that_does_not_speak_tls(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fanlight.proxies._resolved", lambda name: [])
    with FakeProxy(login="me:secret") as proxy:
        monkeypatch.setenv("https_proxy", proxy.url().replace("secret", "wrong"))
        with pytest.raises(Unavailable, match="cannot be reached"):
            await asyncio.to_thread(pinned_roots, "gateway.example:50051", "0" * 64)


@pytest.mark.parametrize("jump_s", [300.0, -300.0, 10 * 365 * 86_400.0, -10 * 365 * 86_400.0])
async def test_a_node_whose_clock_jumps_goes_on_with_its_used_up_code(
    door: Door, tmp_path: Path, jump_s: float
) -> None:
    now_s = 1_000_000_000.0
    code = await door.invite()
    identity = door.identity(code, tmp_path / "state", lambda: now_s)
    await identity.establish()
    now_s += jump_s
    again = door.identity(code, tmp_path / "state", lambda: now_s)
    await again.establish()
    assert again.node_id == identity.node_id
    assert door.fleet.gateway.nodes.of_credential(again.token())
    await again.renew_if_due()
    assert door.fleet.gateway.nodes.of_credential(again.token())
    # Whatever the clock says, it is renewed in time.
    renewed = again.token()
    now_s += 4 * 3_600.0
    await again.renew_if_due()
    assert again.token() != renewed


async def test_a_worker_that_slept_through_a_renewal_does_not_look_like_a_copy(door: Door, tmp_path: Path) -> None:
    now_s = 1_000_000_000.0
    code = await door.invite()
    awake, asleep = (door.identity(code, tmp_path / "state", lambda: now_s) for _ in range(2))
    await awake.establish()
    await asleep.establish()
    for _ in range(3):
        now_s += 4 * 3_600.0
        door.fleet.clock.advance(4 * 3_600.0)
        await awake.renew_if_due()
    now_s += 4 * 3_600.0
    door.fleet.clock.advance(4 * 3_600.0)
    await asleep.renew_if_due()
    assert door.fleet.gateway.nodes.of_credential(asleep.token())
    await awake.renew_if_due()
    assert awake.token() == asleep.token()


async def test_two_machines_with_one_credential_both_lose_it_and_the_code_admits_the_next_one(
    door: Door, tmp_path: Path
) -> None:
    now_s = 1_000_000_000.0
    code = await door.invite(uses=2, ttl_s=86_400)
    nodes = door.fleet.gateway.nodes
    owner = door.identity(code, tmp_path / "state", lambda: now_s)
    await owner.establish()
    shutil.copytree(tmp_path / "state", tmp_path / "stolen")
    thief = door.identity(code, tmp_path / "stolen", lambda: now_s)
    await thief.establish()
    assert (thief.node_id, thief.token()) == (owner.node_id, owner.token()), (
        "until its renewal nothing tells them apart"
    )
    now_s += 4 * 3_600.0
    door.fleet.clock.advance(4 * 3_600.0)
    await thief.renew_if_due()
    await nodes.note_use(thief.token())
    with pytest.raises(Unauthenticated, match="two machines have it"):
        await owner.renew_if_due()
    assert nodes.of_credential(thief.token()) is None
    assert nodes.of_credential(owner.token()) is None
    before = owner.node_id
    await owner.recover()
    assert nodes.of_credential(owner.token())
    assert owner.node_id != before
    with pytest.raises(Unauthenticated, match="used up"):
        await thief.recover()
