"""Nodes join, renew, and lose their rights."""

import hashlib
import itertools
from collections.abc import Callable, Iterator

import pytest

from fanlight.contract.join_code import JoinCode, parse_join_code
from fanlight.errors import FailedPrecondition, InvalidField, NotFound, Unauthenticated
from services.gateway.app.nodes import NODES_BUCKET, IssuedCredential, Nodes, VerifiedIdentity
from services.gateway.app.records import Records
from services.gateway.domain.nodes import OVERLAP_S, CopiedCredential, Grant, NodeState, state_of
from tests.fakes.audit import audit_log
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore

CREDENTIAL_TTL_S = 600.0
SALAD = VerifiedIdentity(proof="salad", subject="machine-1", grant=Grant(pool="salad"), token_hash="a" * 64)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore()
    yield store
    store.close()


def counted_bytes(start: int = 0) -> Callable[[int], bytes]:
    """Different at each call, as random bytes are."""
    numbers = itertools.count(start)
    return lambda size: hashlib.sha512(str(next(numbers)).encode()).digest()[:size]


def nodes_over(records: Records, clock: FakeClock, random_bytes: Callable[[int], bytes]) -> Nodes:
    log = audit_log(records, clock)
    return Nodes(records, clock, random_bytes, log, credential_ttl_s=CREDENTIAL_TTL_S)


@pytest.fixture
def nodes(store: MemoryStore, clock: FakeClock) -> Nodes:
    return Nodes(
        records := Records(store, clock),
        clock,
        counted_bytes(),
        audit_log(records, clock),
        credential_ttl_s=CREDENTIAL_TTL_S,
    )


ANYTHING = Grant()


async def join(
    nodes: Nodes, *, uses: int = 1, grant: Grant = ANYTHING, stages: tuple[str, ...] = ()
) -> IssuedCredential:
    invite, secret = await nodes.invite(grant, uses=uses, ttl_s=60.0, comment="")
    return await nodes.join_with_code(invite.id, secret, name="box", stages=stages)


async def test_a_node_joins_with_a_code_and_is_known_by_its_credential(nodes: Nodes) -> None:
    issued = await join(nodes, grant=Grant(pool="home"))
    found = nodes.of_credential(issued.credential)
    assert found is not None
    assert (found.id, found.grant.pool) == (issued.node.id, "home")
    assert nodes.of_credential(issued.credential[:-1] + "0") is None
    assert nodes.of_credential("") is None


async def test_a_join_code_serves_as_many_nodes_as_it_says(nodes: Nodes) -> None:
    invite, secret = await nodes.invite(Grant(), uses=2, ttl_s=60.0, comment="")
    first, second = [await nodes.join_with_code(invite.id, secret, name="box", stages=()) for _ in range(2)]
    assert first.node.id != second.node.id
    with pytest.raises(Unauthenticated, match="used up"):
        await nodes.join_with_code(invite.id, secret, name="box", stages=())


async def test_an_expired_a_wrong_and_a_removed_code_admit_nobody(nodes: Nodes, clock: FakeClock) -> None:
    invite, secret = await nodes.invite(Grant(), uses=5, ttl_s=60.0, comment="")
    with pytest.raises(Unauthenticated, match="wrong"):
        await nodes.join_with_code(invite.id, "0" * 64, name="box", stages=())
    with pytest.raises(Unauthenticated, match="wrong"):
        await nodes.join_with_code("0" * 10, secret, name="box", stages=())
    clock.advance(60.0)
    with pytest.raises(Unauthenticated, match="expired"):
        await nodes.join_with_code(invite.id, secret, name="box", stages=())
    assert await nodes.invites() == []
    other, secret = await nodes.invite(Grant(), uses=5, ttl_s=60.0, comment="")
    await nodes.remove_invite(other.id)
    with pytest.raises(Unauthenticated):
        await nodes.join_with_code(other.id, secret, name="box", stages=())


async def test_a_code_for_one_stage_admits_to_no_other(nodes: Nodes) -> None:
    issued = await join(nodes, grant=Grant(stages=("preprocess",)))
    assert issued.node.grant.stages == ("preprocess",)
    with pytest.raises(InvalidField, match="preprocess"):
        await join(nodes, grant=Grant(stages=("preprocess",)), stages=("diffusion",))


async def test_a_renewed_credential_replaces_the_old_one_after_an_overlap(nodes: Nodes, clock: FakeClock) -> None:
    first = await join(nodes)
    second = await nodes.renew(first.credential)
    assert nodes.of_credential(first.credential)
    assert nodes.of_credential(second.credential)
    clock.advance(OVERLAP_S)
    assert nodes.of_credential(first.credential) is None
    assert nodes.of_credential(second.credential)
    clock.advance(CREDENTIAL_TTL_S)
    assert nodes.of_credential(second.credential) is None
    assert state_of(nodes.get(first.node.id), clock.now_s()) is NodeState.EXPIRED


async def test_a_lost_response_to_a_renewal_locks_nobody_out(nodes: Nodes) -> None:
    first = await join(nodes)
    lost = await nodes.renew(first.credential)
    again = await nodes.renew(first.credential)
    assert nodes.of_credential(lost.credential) is None
    assert nodes.of_credential(again.credential)


async def test_a_copied_credential_ends_all_of_its_node(nodes: Nodes) -> None:
    first = await join(nodes)
    second = await nodes.renew(first.credential)
    await nodes.note_use(second.credential)
    with pytest.raises(CopiedCredential):
        await nodes.renew(first.credential)
    assert nodes.of_credential(second.credential) is None
    with pytest.raises(Unauthenticated):
        await nodes.renew(second.credential)


async def test_a_revoked_node_loses_its_credentials_at_every_gateway(
    store: MemoryStore, clock: FakeClock, nodes: Nodes
) -> None:
    issued = await join(nodes)
    other = Nodes(
        records := Records(store, clock),
        clock,
        counted_bytes(1_000),
        audit_log(records, clock),
        credential_ttl_s=CREDENTIAL_TTL_S,
    )
    await other.load()
    assert other.of_credential(issued.credential)
    await nodes.revoke(issued.node.id, "it lied")
    record = await store.get(NODES_BUCKET, issued.node.id)
    assert record is not None
    other.take(record)
    assert other.of_credential(issued.credential) is None
    assert other.pop_ended() == [issued.node.id]
    assert other.pop_ended() == []
    with pytest.raises(Unauthenticated):
        await other.renew(issued.credential)


async def test_a_platforms_machine_is_the_same_node_each_time_and_stays_revoked(nodes: Nodes) -> None:
    first = await nodes.join_verified(SALAD, name="box", stages=())
    second = await nodes.join_verified(SALAD, name="box", stages=())
    assert first.node.id == second.node.id
    assert nodes.of_credential(first.credential)
    assert nodes.of_credential(second.credential)
    await nodes.revoke(first.node.id, "it lied")
    with pytest.raises(Unauthenticated, match="revoked"):
        await nodes.join_verified(SALAD, name="box", stages=())


async def test_a_platforms_token_is_exchanged_only_so_often(nodes: Nodes, clock: FakeClock) -> None:
    token = VerifiedIdentity(
        proof="salad",
        subject="machine-1",
        grant=Grant(),
        token_hash="b" * 64,
        token_expire_s=clock.now_s() + 300.0,
        token_uses=2,
    )
    for _ in range(2):
        await nodes.join_verified(token, name="box", stages=())
    with pytest.raises(Unauthenticated, match="2 times"):
        await nodes.join_verified(token, name="box", stages=())


async def test_only_a_node_that_cannot_work_is_removed(nodes: Nodes) -> None:
    issued = await join(nodes)
    with pytest.raises(FailedPrecondition, match="revoke it first"):
        await nodes.remove(issued.node.id)
    await nodes.revoke(issued.node.id, "")
    await nodes.remove(issued.node.id)
    with pytest.raises(NotFound):
        nodes.get(issued.node.id)


async def test_nodes_are_listed_page_by_page_the_newest_first(nodes: Nodes, clock: FakeClock) -> None:
    ids = []
    for _ in range(3):
        ids.append((await join(nodes)).node.id)
        clock.advance(1.0)
    first = nodes.page(before="", limit=2)
    assert [node.id for node in first] == [ids[2], ids[1]]
    assert [node.id for node in nodes.page(before=first[-1].id, limit=2)] == [ids[0]]
    with pytest.raises(InvalidField):
        nodes.page(before="nobody", limit=2)


async def test_the_sweep_forgets_nodes_that_expired_long_ago_and_keeps_revoked_ones(
    nodes: Nodes, clock: FakeClock
) -> None:
    gone, revoked = await join(nodes), await join(nodes)
    await nodes.revoke(revoked.node.id, "it lied")
    clock.advance(60 * 86_400.0)
    await nodes.sweep()
    with pytest.raises(NotFound):
        nodes.get(gone.node.id)
    assert nodes.get(revoked.node.id).reason == "it lied"


@pytest.mark.parametrize("gateway", ["", "gateway.example:50051", "10.0.0.1:50051,10.0.0.2:50051"])
@pytest.mark.parametrize("authority", ["", "c" * 64])
@pytest.mark.parametrize("is_own", [True, False])
def test_a_join_code_reads_back_as_it_was(gateway: str, authority: str, is_own: bool) -> None:
    code = JoinCode(
        invite="0123456789", secret="d" * 64, authority=authority, is_own=is_own and bool(authority), gateway=gateway
    )
    assert parse_join_code(f" {code}\n") == code
    assert "d" * 64 not in repr(code)


@pytest.mark.parametrize("text", ["", "flj1", "flj1.x.y.-", "flj1.0123456789." + "d" * 63 + ".-", "x" * 5_000])
def test_what_is_no_join_code_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(InvalidField, match="copy all"):
        parse_join_code(text)
