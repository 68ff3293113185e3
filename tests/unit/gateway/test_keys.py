"""API keys: created once, found by their secret, rotated, revoked, swept."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fanlight.errors import FailedPrecondition, InvalidField, NotFound, PermissionDenied, ResourceExhausted
from services.gateway.app import keys as module
from services.gateway.app.keys import (
    KEYS_BUCKET,
    RETENTION_S,
    SESSION_TTL_S,
    SESSIONS_LIMIT_EACH,
    CreatedKey,
    Keys,
    VerifiedPerson,
)
from services.gateway.app.records import Records
from services.gateway.app.tenants import OPERATOR, Caller, callers_of, check_tokens, token_of
from services.gateway.domain.keys import RIGHTS, KeyRole, KeyState, Right, state_of
from services.kernel.config import SettingsError
from tests.fakes.audit import audit_log
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore
from tests.unit.gateway.test_nodes import counted_bytes

TOKEN = "operator-0123456789"
ACME = Caller(tenant="acme")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore()
    yield store
    store.close()


def keys_over(store: MemoryStore, clock: FakeClock, start: int = 0) -> Keys:
    keys = Keys(records := Records(store, clock), clock, counted_bytes(start), audit_log(records, clock))
    keys.use_tokens({TOKEN: OPERATOR})
    return keys


@pytest.fixture
def keys(store: MemoryStore, clock: FakeClock) -> Keys:
    return keys_over(store, clock)


async def made(keys: Keys, *, role: KeyRole = KeyRole.SUBMIT, ttl_s: float = 0.0, tenant: str = "acme") -> CreatedKey:
    return await keys.create(OPERATOR, tenant=tenant, role=role, note="", ttl_s=ttl_s)


async def test_a_key_is_found_by_its_secret_and_by_nothing_else(keys: Keys, store: MemoryStore) -> None:
    created = await made(keys)
    assert keys.caller_of(created.secret) == Caller(tenant="acme", role=KeyRole.SUBMIT, key_id=created.key.id)
    for wrong in ("", created.key.id, created.secret[:-1], f"{created.secret[:-1]}x", created.secret.upper()):
        assert keys.caller_of(wrong) is None
    [record] = await store.list(KEYS_BUCKET, limit=10)
    assert created.secret.encode() not in record.value
    assert created.secret.rpartition("_")[2].encode() not in record.value
    assert created.secret not in repr(created)


async def test_a_key_expires(keys: Keys, clock: FakeClock) -> None:
    created = await made(keys, ttl_s=60.0)
    clock.advance(59.0)
    assert keys.caller_of(created.secret) is not None
    clock.advance(1.0)
    assert keys.caller_of(created.secret) is None
    assert state_of(keys.get(OPERATOR, created.key.id), clock.now_s()) is KeyState.EXPIRED


async def test_another_gateway_knows_a_key_and_its_end_from_the_store(
    keys: Keys, store: MemoryStore, clock: FakeClock
) -> None:
    other = keys_over(store, clock, 100)
    created = await made(keys)
    await other.load()
    assert other.caller_of(created.secret) is not None
    await keys.revoke(OPERATOR, created.key.id)
    record = await store.get(KEYS_BUCKET, created.key.id)
    assert record is not None
    other.take(record)
    assert other.caller_of(created.secret) is None


async def test_a_rotated_key_ends_after_the_overlap_and_its_successor_is_like_it(keys: Keys, clock: FakeClock) -> None:
    old = await made(keys, role=KeyRole.READ, ttl_s=1_000.0)
    clock.advance(100.0)
    new = await keys.rotate(OPERATOR, old.key.id, overlap_s=30.0)
    assert (new.key.role, new.key.tenant, new.key.parent) == (KeyRole.READ, "acme", old.key.id)
    assert new.key.expire_s == clock.now_s() + 1_000.0
    assert keys.caller_of(old.secret) is not None
    clock.advance(30.0)
    assert keys.caller_of(old.secret) is None
    assert keys.caller_of(new.secret) is not None
    with pytest.raises(FailedPrecondition, match="expired"):
        await keys.rotate(OPERATOR, old.key.id, overlap_s=30.0)


async def test_an_admin_manages_its_own_tenants_keys_and_no_others(keys: Keys) -> None:
    foreign = await made(keys, tenant="globex")
    own = await keys.create(ACME, tenant="", role=KeyRole.READ, note="", ttl_s=0.0)
    assert own.key.tenant == "acme"
    assert [key.id for key in keys.page(ACME, tenant="", with_ended=True, before="", limit=10)] == [own.key.id]
    for attempt in (keys.rotate(ACME, foreign.key.id, overlap_s=0.0), keys.revoke(ACME, foreign.key.id)):
        with pytest.raises(NotFound):
            await attempt
    with pytest.raises(PermissionDenied) as caught:
        await keys.create(ACME, tenant="globex", role=KeyRole.READ, note="", ttl_s=0.0)
    assert caught.value.field == "tenant"


@pytest.mark.parametrize("role", [KeyRole.OPERATOR, KeyRole.SCALER])
async def test_an_admin_gives_no_role_above_its_own(keys: Keys, role: KeyRole) -> None:
    with pytest.raises(PermissionDenied) as caught:
        await keys.create(ACME, tenant="", role=role, note="", ttl_s=0.0)
    assert caught.value.field == "role"
    scaler = await made(keys, role=KeyRole.SCALER)
    with pytest.raises(PermissionDenied):
        await keys.revoke(ACME, scaler.key.id)


@pytest.mark.parametrize("role", [each for each in KeyRole if each not in (KeyRole.OPERATOR, KeyRole.ADMIN)])
async def test_other_roles_manage_nothing(keys: Keys, role: KeyRole) -> None:
    caller = Caller(tenant="acme", role=role)
    with pytest.raises(PermissionDenied, match="manage its tenant"):
        await keys.create(caller, tenant="", role=KeyRole.READ, note="", ttl_s=0.0)
    with pytest.raises(PermissionDenied):
        keys.page(caller, tenant="", with_ended=False, before="", limit=10)


async def test_an_operators_key_belongs_to_no_tenant(keys: Keys) -> None:
    with pytest.raises(InvalidField) as caught:
        await made(keys, role=KeyRole.OPERATOR)
    assert caught.value.field == "tenant"


async def test_without_an_operators_token_no_key_is_made_and_none_counts(store: MemoryStore, clock: FakeClock) -> None:
    created = await made(keys_over(store, clock))
    bare = Keys(records := Records(store, clock), clock, counted_bytes(100), audit_log(records, clock))
    await bare.load()
    assert bare.caller_of(created.secret) is None
    with pytest.raises(FailedPrecondition, match="FANLIGHT_CLIENT_TOKEN"):
        await made(bare)


async def test_a_tenant_has_so_many_keys_and_no_more(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS_LIMIT", 2)
    first, _ = await made(keys), await made(keys)
    with pytest.raises(ResourceExhausted):
        await made(keys)
    await made(keys, tenant="globex")
    await keys.revoke(OPERATOR, first.key.id)
    await made(keys)


async def test_a_session_ends_with_the_key_that_opened_it(keys: Keys) -> None:
    key = await made(keys)
    caller = keys.caller_of(key.secret)
    assert caller is not None
    session = await keys.open_session(caller, key.secret)
    inside = keys.caller_of(session.secret)
    assert inside is not None
    assert (inside.tenant, inside.role) == ("acme", KeyRole.SUBMIT)
    again = await keys.open_session(inside, session.secret)
    await keys.revoke(OPERATOR, key.key.id)
    assert keys.caller_of(session.secret) is None
    assert keys.caller_of(again.secret) is None


async def test_a_session_of_a_token_ends_when_the_settings_have_another(keys: Keys, clock: FakeClock) -> None:
    session = await keys.open_session(OPERATOR, TOKEN)
    assert keys.caller_of(session.secret) is not None
    keys.use_tokens({"another-0123456789": OPERATOR})
    assert keys.caller_of(session.secret) is None


async def test_a_persons_session_ends_with_their_token_at_the_latest(keys: Keys, clock: FakeClock) -> None:
    person = VerifiedPerson(issuer="co", subject="ann", tenant="acme", role=KeyRole.READ, expire_s=clock.now_s() + 90.0)
    session = await keys.open_session_of(person)
    assert keys.caller_of(session.secret) == Caller(tenant="acme", role=KeyRole.READ, key_id=session.key.id)
    clock.advance(90.0)
    assert keys.caller_of(session.secret) is None


async def test_who_signs_out_has_no_session(keys: Keys) -> None:
    session = await keys.open_session(OPERATOR, TOKEN)
    caller = keys.caller_of(session.secret)
    assert caller is not None
    await keys.close_session(caller)
    assert keys.caller_of(session.secret) is None
    key = await made(keys)
    own = keys.caller_of(key.secret)
    assert own is not None
    await keys.close_session(own)
    assert keys.caller_of(key.secret) is not None


async def test_a_sweep_writes_the_last_use_and_forgets_what_ended_long_ago(
    keys: Keys, store: MemoryStore, clock: FakeClock
) -> None:
    key, unused = await made(keys), await made(keys, ttl_s=60.0)
    session = await keys.open_session(OPERATOR, TOKEN)
    clock.advance(5.0)
    keys.caller_of(key.secret)
    await keys.sweep()
    other = keys_over(store, clock, 100)
    await other.load()
    assert other.get(OPERATOR, key.key.id).use_s == clock.now_s()
    assert other.get(OPERATOR, unused.key.id).use_s == 0.0
    clock.advance(max(SESSION_TTL_S, RETENTION_S) + 61.0)
    await keys.sweep()
    kept = {record.key for record in await store.list(KEYS_BUCKET, limit=10)}
    assert kept == {key.key.id}
    assert session.key.id not in kept


async def test_a_key_that_another_gateway_deletes_keeps_no_use_of_others_from_being_written(
    keys: Keys, store: MemoryStore, clock: FakeClock
) -> None:
    gone, kept = await made(keys), await made(keys)
    for each in (gone, kept):
        keys.caller_of(each.secret)
    await store.delete(KEYS_BUCKET, gone.key.id)
    await keys.sweep()
    other = keys_over(store, clock, 100)
    await other.load()
    assert other.get(OPERATOR, kept.key.id).use_s == clock.now_s()


async def test_who_opens_session_after_session_ends_only_ones_own_oldest(keys: Keys, clock: FakeClock) -> None:
    reader, other = await made(keys, role=KeyRole.READ), await made(keys, role=KeyRole.READ)
    caller = Caller(tenant="acme", role=KeyRole.READ, key_id=reader.key.id)
    kept = await keys.open_session(replace(caller, key_id=other.key.id), other.secret)
    opened = []
    for _ in range(SESSIONS_LIMIT_EACH + 2):
        clock.advance(1.0)
        opened.append(await keys.open_session(caller, reader.secret))
    valid = [keys.caller_of(each.secret) is not None for each in opened]
    assert valid == [False] * 2 + [True] * SESSIONS_LIMIT_EACH
    assert keys.caller_of(kept.secret) is not None


async def test_of_ended_keys_a_tenants_latest_are_listed(
    keys: Keys, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant that keeps creating and revoking fills no memory."""
    monkeypatch.setattr(module, "ENDED_LIMIT", 2)
    others = await made(keys, tenant="globex")
    ended = [await made(keys) for _ in range(4)]
    for each in (others, *ended):
        clock.advance(1.0)
        await keys.revoke(OPERATOR, each.key.id)
    valid = await made(keys)
    await keys.sweep()
    listed = keys.page(OPERATOR, tenant="", with_ended=True, before="", limit=10)
    assert {key.id for key in listed} == {each.key.id for each in (others, *ended[2:], valid)}


def test_each_role_has_the_rights_of_those_below_it() -> None:
    ladder = [KeyRole.READ, KeyRole.SUBMIT, KeyRole.ADMIN, KeyRole.OPERATOR]
    for lower, higher in itertools.pairwise(ladder):
        assert RIGHTS[lower] < RIGHTS[higher]
    for role in (KeyRole.METRICS, KeyRole.SCALER):
        assert not RIGHTS[role] & {Right.READ, Right.SUBMIT, Right.MANAGE, Right.OPERATE}
    assert set(RIGHTS) == set(KeyRole)


def test_a_refused_right_names_the_roles_that_have_it() -> None:
    with pytest.raises(PermissionDenied, match=r"read does not let you submit jobs.*operator or admin or submit"):
        Caller(tenant="acme", role=KeyRole.READ).require(Right.SUBMIT)


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic YW5uOmFiYw==", "abc"),
        ("Basic YWJjOg==", "abc"),
        ("Basic not-base64", ""),
        ("Basic /w==", ""),
        ("Digest abc", ""),
        ("abc", ""),
        ("", ""),
    ],
)
def test_a_token_is_read_from_bearer_and_basic(header: str, token: str) -> None:
    assert token_of(header) == token


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"A": "short"}, "A: can be guessed"),
        ({"A": "aaaaaaaaaaaaaaaaaaaaaaaa"}, "A: can be guessed"),
        ({"A": "operator-0123456789", "B": "operator-0123456789"}, "B: must be another one than A"),
    ],
)
def test_tokens_that_can_be_guessed_or_come_twice_are_refused(tokens: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        check_tokens(tokens)


def test_tokens_that_are_not_set_are_no_fault() -> None:
    check_tokens({"A": "", "B": "", "C": "operator-0123456789"})


async def test_a_key_calls_where_a_token_does(keys: Keys) -> None:
    callers = callers_of(TOKEN, [], keys)
    created = await made(keys)
    assert callers.of_token(TOKEN) == OPERATOR
    assert callers.of_token(created.secret) == Caller(tenant="acme", role=KeyRole.SUBMIT, key_id=created.key.id)
    assert callers.of_token("flk_k0000000000000000_" + "0" * 64) is None
