"""Every change leaves one entry with who made it; entries that were changed, removed or reordered are found."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import pytest

from fanlight.contract.audit_log import (
    SUCCESS,
    TEXT_LIMIT_BYTES,
    AuditChain,
    AuditEntry,
    EntryKind,
    entry_of,
    event_of,
    hashed,
    verify,
)
from fanlight.errors import (
    Conflict,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from services.gateway.app import audit_log as module
from services.gateway.app.audit_log import BUCKET, AuditLog, act_as, acting
from services.gateway.app.job_store import JOBS_BUCKET
from services.gateway.app.records import Records
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.keys import KeyRole
from services.gateway.domain.machine import FAILURES_LIMIT
from services.gateway.domain.nodes import Grant
from services.gateway.ports import NewRecord
from tests.fakes.fleet import FakeClock, Fleet, FleetWorker, annotation, generation
from tests.fakes.memory_store import MemoryStore
from tests.fakes.moody_store import MoodyStore

TOKEN = "operator-0123456789"
BOSS = replace(OPERATOR, key_id="k0000000000000001")
ACME = Caller(tenant="acme", key_id="k0000000000000002")
ADDRESS = "203.0.113.7"


class SplitStore(MemoryStore):
    """Writes the record before another one on its own, as NATS does."""

    @property
    def commits_together(self) -> bool:
        return False


@pytest.fixture(params=[MemoryStore, SplitStore])
async def fleet(request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    async with Fleet(store=request.param()).running() as running:
        running.gateway.keys.use_tokens({TOKEN: OPERATOR})
        act_as(BOSS, ADDRESS)
        yield running
        acting.set(module.THE_GATEWAY)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def log_over(store: MemoryStore, clock: FakeClock, *, retention_count: int = 1_000) -> AuditLog:
    records = Records(store, clock)
    return AuditLog(records, clock, os.urandom, retention_s=86_400.0, retention_count=retention_count)


async def entries_of(log: AuditLog) -> Sequence[AuditEntry]:
    """The oldest first."""
    found, _ = await log.page(before="", limit=1_000)
    return found[::-1]


async def entries(fleet: Fleet) -> Sequence[AuditEntry]:
    return await entries_of(fleet.gateway.audit)


async def only_entry(fleet: Fleet) -> AuditEntry:
    """Of the last change: a change, or an intent with its completion."""
    entry, *rest = await entries(fleet)
    if entry.kind is EntryKind.INTENT:
        [done] = rest
        assert (done.kind, done.intent) == (EntryKind.COMPLETION, entry.number)
        return replace(entry, result=done.result, detail=done.detail)
    assert rest == []
    return entry


async def make(log: AuditLog, count: int) -> None:
    for number in range(count):
        async with log.change("keys.create", f"keys/{number}"):
            pass


async def clear(fleet: Fleet) -> None:
    """Forget what was logged so far."""
    for bucket in (BUCKET, module.CHAINS_BUCKET):
        for record in await fleet.store.list(bucket, limit=1_000):
            await fleet.store.delete(bucket, record.key)


# Who did what.


async def change_key(fleet: Fleet, event: str) -> str:
    keys = fleet.gateway.keys
    made = await keys.create(BOSS, tenant="acme", role=KeyRole.READ, note="a secret plan", ttl_s=0.0)
    if event == "create":
        return made.key.id
    await clear(fleet)
    if event == "rotate":
        await keys.rotate(BOSS, made.key.id, overlap_s=10.0)
    else:
        await keys.revoke(BOSS, made.key.id)
    return made.key.id


@pytest.mark.parametrize("event", ["create", "rotate", "revoke"])
async def test_a_change_of_a_key_leaves_one_entry(fleet: Fleet, event: str) -> None:
    key_id = await change_key(fleet, event)
    entry = await only_entry(fleet)
    assert (entry.action, entry.target, entry.target_tenant) == (f"keys.{event}", f"keys/{key_id}", "acme")
    assert (entry.actor.role, entry.actor.key_id, entry.actor.address) == ("operator", BOSS.key_id, ADDRESS)
    assert entry.result == SUCCESS
    assert "secret plan" not in str(event_of(entry))


async def test_sessions_leave_an_entry_each(fleet: Fleet) -> None:
    made = await fleet.gateway.keys.create(BOSS, tenant="acme", role=KeyRole.READ, note="", ttl_s=0.0)
    await clear(fleet)
    caller = Caller(tenant="acme", role=KeyRole.READ, key_id=made.key.id)
    act_as(caller, ADDRESS)
    opened = await fleet.gateway.keys.open_session(caller, made.secret)
    entry = await only_entry(fleet)
    assert (entry.action, entry.target, entry.actor.key_id) == (
        "sessions.open",
        f"keys/{opened.key.id}",
        made.key.id,
    )
    assert opened.secret not in str(event_of(entry))
    await clear(fleet)
    await fleet.gateway.keys.close_session(replace(caller, key_id=opened.key.id))
    assert (await only_entry(fleet)).action == "sessions.close"


async def node_of(fleet: Fleet) -> str:
    nodes = fleet.gateway.nodes
    invite, secret = await nodes.invite(Grant(), uses=1, ttl_s=60.0, comment="")
    return (await nodes.join_with_code(invite.id, secret, name="n", stages=())).node.id


@pytest.mark.parametrize("event", ["drain", "undrain", "revoke", "purge", "remove"])
async def test_a_change_of_a_node_leaves_one_entry(fleet: Fleet, event: str) -> None:
    gateway, node = fleet.gateway, await node_of(fleet)
    act_as(BOSS, ADDRESS)
    if event == "remove":
        await gateway.nodes.revoke(node, "old")
    await clear(fleet)
    await {
        "drain": lambda: gateway.nodes.drain(node, draining=True),
        "undrain": lambda: gateway.nodes.drain(node, draining=False),
        "revoke": lambda: gateway.nodes.revoke(node, "it lied"),
        "purge": lambda: gateway.purge_node(node),
        "remove": lambda: gateway.nodes.remove(node),
    }[event]()
    entry = await only_entry(fleet)
    assert (entry.action, entry.target) == (f"nodes.{event}", f"nodes/{node}")
    assert (entry.actor.key_id, entry.result) == (BOSS.key_id, SUCCESS)


async def test_a_node_that_joins_is_the_one_who_did_it(fleet: Fleet) -> None:
    invite, secret = await fleet.gateway.nodes.invite(Grant(), uses=1, ttl_s=60.0, comment="")
    assert (await only_entry(fleet)).action == "invites.create"
    await clear(fleet)
    module.act_as_node("", ADDRESS)
    issued = await fleet.gateway.nodes.join_with_code(invite.id, secret, name="n", stages=())
    entry = await only_entry(fleet)
    assert (entry.action, entry.target) == ("nodes.join", f"nodes/{issued.node.id}")
    assert (entry.actor.role, entry.actor.key_id, entry.actor.address) == ("node", issued.node.id, ADDRESS)
    assert issued.credential not in str(event_of(entry))


async def test_an_invitation_that_is_removed_leaves_one_entry(fleet: Fleet) -> None:
    invite, _ = await fleet.gateway.nodes.invite(Grant(), uses=1, ttl_s=60.0, comment="")
    await clear(fleet)
    await fleet.gateway.nodes.remove_invite(invite.id)
    assert (await only_entry(fleet)).target == f"invites/{invite.id}"


async def test_a_tenants_change_leaves_one_entry(fleet: Fleet) -> None:
    await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, weight=2.0))
    entry = await only_entry(fleet)
    assert (entry.action, entry.target, entry.target_tenant) == ("tenants.set", "tenants/acme", "acme")


async def test_a_data_key_that_cannot_be_rotated_leaves_one_entry(fleet: Fleet) -> None:
    with pytest.raises(FailedPrecondition):
        await fleet.gateway.rotate_data_key("acme")
    entry = await only_entry(fleet)
    assert (entry.action, entry.target_tenant, entry.result) == ("data_keys.rotate", "acme", FailedPrecondition.reason)


async def test_a_removed_damaged_record_leaves_one_entry(fleet: Fleet) -> None:
    await fleet.store.create(JOBS_BUCKET, "zz", b"rubbish")
    await fleet.gateway.jobs.list(page_size=0, page_token="")
    await fleet.gateway.remove_damaged(JOBS_BUCKET, "zz")
    entry = await only_entry(fleet)
    assert (entry.action, entry.target) == ("damaged_records.remove", "damaged-records/jobs/zz")


async def test_a_redriven_dead_letter_leaves_one_entry(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    await worker.come()
    job = await fleet.gateway.jobs.create(generation(1), ACME)
    for _ in range(FAILURES_LIMIT):
        fleet.rest()
        [task] = await worker.lease()
        await worker.fail(task)
    act_as(ACME, ADDRESS)
    await fleet.gateway.redrives.redrive(f"{job.name}/tasks/1", ACME)
    entry = await only_entry(fleet)
    assert (entry.action, entry.actor.tenant) == ("dead_letters.redrive", "acme")


async def test_submitted_jobs_and_their_prompts_are_not_in_it(fleet: Fleet, painter: FleetWorker) -> None:
    act_as(ACME, ADDRESS)
    job = await fleet.gateway.jobs.create(generation(1, prompt="a teapot"), ACME)
    await fleet.gateway.jobs.cancel(job.name, ACME)
    assert await entries(fleet) == []
    await fleet.gateway.deletions.delete_job(job.name, ACME)
    assert "teapot" not in str([event_of(each) for each in await entries(fleet)])


async def test_an_operator_that_reads_or_cancels_another_tenants_job_leaves_an_entry(
    fleet: Fleet, painter: FleetWorker
) -> None:
    job = await fleet.gateway.jobs.create(generation(1), ACME)
    act_as(ACME, ADDRESS)
    await fleet.gateway.jobs.get(job.name, ACME)
    assert await entries(fleet) == []
    act_as(BOSS, ADDRESS)
    for _ in range(3):
        await fleet.gateway.jobs.get(job.name, BOSS)
    entry = await only_entry(fleet)
    assert (entry.kind, entry.action, entry.target) == (EntryKind.READ, "jobs.read", job.name)
    assert (entry.target_tenant, entry.actor.key_id) == ("acme", BOSS.key_id)
    fleet.clock.advance(module.READ_WINDOW_S)
    await fleet.gateway.jobs.get(job.name, BOSS)
    assert len(await entries(fleet)) == 2
    await clear(fleet)
    await fleet.gateway.jobs.list(page_size=0, page_token="", caller=BOSS)
    assert (await only_entry(fleet)).target == "tenants/acme/jobs"
    await clear(fleet)
    await fleet.gateway.jobs.cancel(job.name, BOSS)
    assert (await only_entry(fleet)).action == "jobs.cancel"


async def test_a_change_that_is_refused_leaves_an_entry_with_the_reason(fleet: Fleet) -> None:
    with pytest.raises(NotFound):
        await fleet.gateway.nodes.revoke("n1", "x")
    entry = await only_entry(fleet)
    assert (entry.action, entry.result) == ("nodes.revoke", NotFound.reason)
    await clear(fleet)
    with pytest.raises(FailedPrecondition):
        await fleet.gateway.tenant_deletions.delete("default", BOSS)
    assert (await only_entry(fleet)).result == FailedPrecondition.reason


async def test_one_caller_cannot_flood_the_log(fleet: Fleet) -> None:
    refused = 0
    for number in range(900):
        try:
            await fleet.gateway.audit.note_read("jobs.read", f"jobs/{number}", tenant="acme")
        except ResourceExhausted:
            refused += 1
    assert refused > 0
    assert len(await entries(fleet)) == 900 - refused


async def test_what_is_long_is_cut(clock: FakeClock) -> None:
    log = log_over(MemoryStore(), clock)
    async with log.change("keys.create", "ü" * 10_000) as change:
        change.detail = "d" * 10_000
    [entry] = await entries_of(log)
    assert len(entry.target.encode()) <= TEXT_LIMIT_BYTES
    assert len(entry.detail) == TEXT_LIMIT_BYTES


# The chain.


async def verified(log: AuditLog, change: Callable[[list[AuditEntry]], None] = lambda found: None) -> Sequence[str]:
    found = list(await entries_of(log))
    change(found)
    return verify(found, await log.chains()).faults


async def test_a_whole_log_is_whole_also_as_cloud_events(clock: FakeClock) -> None:
    log = log_over(MemoryStore(), clock)
    await make(log, 5)
    assert await verified(log) == []
    assert [entry_of(event_of(each)) for each in await entries_of(log)] == await entries_of(log)
    assert verify([], await log_over(MemoryStore(), clock).chains()).faults == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda found: found.__setitem__(2, replace(found[2], target="keys/x")), "/3: was changed"),
        (lambda found: found.__setitem__(2, hashed(replace(found[2], target="keys/x"))), "/4: does not follow"),
        (lambda found: found.pop(2), "/3: is missing"),
        (lambda found: found.pop(0), "/1: is missing at the beginning"),
        (lambda found: found.pop(), "/5: is missing, up to"),
        (lambda found: found.clear(), "all 5 entries are missing"),
        (lambda found: found.append(found[2]), "/3: is there twice"),
        (lambda found: found.append(hashed(replace(found[2], chain="cffff", number=7))), "does not know this chain"),
        (
            lambda found: found.__setitem__(slice(1, 3), [replace(found[2], number=2), replace(found[1], number=3)]),
            "was changed",
        ),
        (lambda found: found.__setitem__(4, hashed(replace(found[4], target="keys/x"))), "/5: is another entry"),
    ],
)
async def test_what_was_changed_removed_added_or_reordered_is_found(
    clock: FakeClock, change: Callable[[list[AuditEntry]], None], fault: str
) -> None:
    log = log_over(MemoryStore(), clock)
    await make(log, 5)
    faults = await verified(log, change)
    assert any(fault in each for each in faults), faults


async def test_a_chain_that_was_written_anew_is_found_by_what_was_kept_elsewhere(clock: FakeClock) -> None:
    store = MemoryStore()
    log = log_over(store, clock)
    await make(log, 3)
    known = verify(await entries_of(log), await log.chains()).heads
    before = ""
    forged = []
    for entry in await entries_of(log):
        forged.append(hashed(replace(entry, target="keys/other", previous_hash=before)))
        before = forged[-1].hash
    chains = [AuditChain(head=forged[-1].head)]
    assert verify(forged, chains).faults == []
    assert verify(forged, chains, known).faults
    assert verify([], [], known).faults


async def test_each_gateway_has_a_chain_and_links_to_the_others(clock: FakeClock) -> None:
    store = MemoryStore()
    first, second = log_over(store, clock), log_over(store, clock)
    await make(first, 2)
    await make(second, 2)
    await make(first, 1)
    found = await entries_of(first)
    assert len({entry.chain for entry in found}) == 2
    [opening] = [entry for entry in found if entry.links]
    [older] = [entry for entry in found if entry.chain != opening.chain and entry.number == 2]
    assert opening.links == (older.head,)
    assert await verified(first) == []
    # The other chain is rewritten as a whole, its head too: the link shows it.
    forged, before = [], ""
    for entry in [each for each in found if each.chain == older.chain]:
        forged.append(hashed(replace(entry, target="keys/x", previous_hash=before)))
        before = forged[-1].hash
    rest = [each for each in found if each.chain == opening.chain]
    chains = [AuditChain(head=forged[-1].head), AuditChain(head=rest[-1].head)]
    assert any("names" in fault for fault in verify([*forged, *rest], chains).faults)


async def test_two_gateways_over_one_store_log_at_the_same_time(fleet: Fleet) -> None:
    other = fleet.restarted()
    async with other.running():
        for number in range(5):
            for each in (fleet, other):
                await each.gateway.quotas.change("acme", lambda tenant, n=number: replace(tenant, weight=n + 1.0))
        found = await entries(fleet)
        assert sum(entry.kind is not EntryKind.COMPLETION for entry in found) == 10
        assert len({entry.chain for entry in found}) == 2
        assert verify(found, await other.gateway.audit.chains()).faults == []


async def test_a_change_that_lost_against_another_one_leaves_one_entry(clock: FakeClock) -> None:
    store = MemoryStore()
    log, records = log_over(store, clock), Records(store, clock)
    first = await records.create("tenants", "a", b"1")
    async with log.change("tenants.set", "tenants/a"):
        with pytest.raises(Conflict):
            await records.put("tenants", "a", b"2", revision=first.revision + 1)
        second = await records.put("tenants", "a", b"2", revision=first.revision)
        await records.put("tenants", "a", b"3", revision=second.revision)
    [entry] = await entries_of(log)
    assert (entry.number, entry.kind) == (1, EntryKind.CHANGE)


# Crashes and faults.


class Killed(BaseException):
    """Nothing of the process runs on."""


async def test_a_crash_between_intent_and_change_shows(clock: FakeClock) -> None:
    store = SplitStore()
    log, records = log_over(store, clock), Records(store, clock)
    with contextlib.suppress(Killed):
        async with log.change("keys.create", "keys/1"):
            await records.create("keys", "1", b"x")
            raise Killed
    after = log_over(store, clock)
    result = verify(await entries_of(after), await after.chains())
    assert result.faults == []
    assert [entry.target for entry in result.open_intents] == ["keys/1"]
    await make(after, 1)
    assert await verified(after) == []


async def test_a_crash_before_the_head_is_noted_is_no_fault(clock: FakeClock) -> None:
    store = MemoryStore()
    log = log_over(store, clock)
    await make(log, 2)

    async def killed(entry: AuditEntry) -> None:
        raise Killed

    log._note_head = killed  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        await make(log, 1)
    after = log_over(store, clock)
    await make(after, 1)
    found = await entries_of(after)
    assert len(found) == 4
    assert await verified(after) == []


async def test_nothing_is_changed_where_no_entry_can_be_written(clock: FakeClock) -> None:
    store = MoodyStore()
    log, records = log_over(store, clock), Records(store, clock)
    await make(log, 1)
    store.is_full = True
    with pytest.raises(Unavailable):
        async with log.change("keys.create", "keys/2"):
            await records.create("keys", "2", b"x")
    with pytest.raises(Unavailable):
        async with log.change("keys.rotate", "keys/3", steps=True):
            pytest.fail("no step may be done without an intent")
    store.is_full = False
    assert await store.get("keys", "2") is None
    await make(log, 1)
    assert await verified(log) == []
    assert len({entry.chain for entry in await entries_of(log)}) == 2


class LostAnswerStore(MemoryStore):
    """The next write happens, and nobody learns of it."""

    is_lost = False

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None):  # type: ignore[no-untyped-def]
        record = await super().create(bucket, key, value, after=after)
        if self.is_lost:
            self.is_lost = False
            raise Unavailable("the answer is lost")
        return record


async def test_after_a_write_of_unknown_outcome_another_chain_goes_on(clock: FakeClock) -> None:
    store = LostAnswerStore()
    log, records = log_over(store, clock), Records(store, clock)
    await make(log, 1)
    store.is_lost = True
    with pytest.raises(Unavailable):
        async with log.change("keys.create", "keys/2"):
            await records.create("keys", "2", b"x")
    found = await entries_of(log)
    # It was written, with its entry; the caller learned otherwise, and that is there too.
    assert sorted(entry.result for entry in found) == sorted([SUCCESS, SUCCESS, Unavailable.reason])
    assert len({entry.chain for entry in found}) == 2
    assert await verified(log) == []


async def test_a_read_that_cannot_be_logged_is_refused() -> None:
    store = MoodyStore()
    fleet = Fleet(store=store)
    async with fleet.running():
        worker = fleet.worker(DIFFUSION)
        await worker.come()
        job = await fleet.gateway.jobs.create(generation(1), ACME)
        act_as(BOSS, ADDRESS)
        store.is_full = True
        with pytest.raises(Unavailable):
            await fleet.gateway.jobs.get(job.name, BOSS)
        store.is_full = False
        acting.set(module.THE_GATEWAY)


# Retention, and followers.


async def followed_sweep(log: AuditLog, store: MemoryStore) -> None:
    """As a gateway that follows the log sweeps it."""
    for record in (await store.list(BUCKET, limit=10_000))[::-1]:
        log._take(record)
    await log.sweep()


@pytest.mark.parametrize("by", ["count", "age"])
async def test_the_kept_part_of_a_chain_is_verified_after_the_oldest_went(clock: FakeClock, by: str) -> None:
    store = MemoryStore()
    log = log_over(store, clock, retention_count=4 if by == "count" else 1_000)
    await make(log, 6)
    if by == "age":
        clock.advance(86_401.0)
    await make(log, 4)
    await followed_sweep(log, store)
    found = await entries_of(log)
    assert [entry.number for entry in found] == [7, 8, 9, 10]
    assert await verified(log) == []
    # One more that went is no deletion by age.
    assert await verified(log, lambda found: found.pop(0)) != []
    clock.advance(86_401.0)
    await followed_sweep(log, store)
    assert await entries_of(log) == []
    assert await verified(log) == []
    await make(log, 1)
    assert await verified(log) == []


async def test_a_retention_that_is_killed_in_the_middle_is_no_fault(clock: FakeClock) -> None:
    store = MemoryStore()
    log = log_over(store, clock, retention_count=2)
    await make(log, 5)
    delete = store.delete
    deleted = []

    async def dying(bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        if deleted:
            raise Killed
        deleted.append(key)
        await delete(bucket, key, after=after)

    store.delete = dying  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        await followed_sweep(log, store)
    store.delete = delete  # type: ignore[method-assign]
    assert len(await entries_of(log)) == 4
    assert await verified(log) == []


async def test_a_follower_gets_what_any_gateway_writes(fleet: Fleet) -> None:
    other = fleet.restarted()
    async with other.running():
        with fleet.gateway.audit.followed() as entries:
            await other.gateway.quotas.change("acme", lambda tenant: replace(tenant, weight=2.0))
            entry = await anext(entries)
            assert (entry.action, entry.actor.key_id) == ("tenants.set", BOSS.key_id)


async def test_more_keys_give_a_tenant_no_more_entries(clock: FakeClock) -> None:
    """Nor do sessions that its people open, each of which is a key of its own."""
    log, refused = log_over(MemoryStore(), clock, retention_count=10_000), 0
    for number in range(900):
        caller = replace(ACME, key_id=f"k{number:016}")
        try:
            async with log.change("sessions.open", f"keys/{caller.key_id}", tenant="acme", caller=caller):
                pass
        except ResourceExhausted:
            refused += 1
    assert refused > 300
    async with log.change("keys.create", "keys/k1", tenant="globex", caller=Caller(tenant="globex")):
        pass


async def test_followers_are_limited_and_end_with_the_gateway(fleet: Fleet) -> None:
    log = fleet.gateway.audit
    with contextlib.ExitStack() as stack:
        followed = [stack.enter_context(log.followed()) for _ in range(module.FOLLOWERS_LIMIT)]
        with pytest.raises(ResourceExhausted), log.followed():
            pass
        log.drain()
        with pytest.raises(Unavailable):
            await anext(followed[0])


async def test_tenants_do_not_delete_each_others_jobs_and_blobs(fleet: Fleet) -> None:
    annotator = fleet.worker(PREPROCESS)
    await annotator.come()
    job = await fleet.gateway.jobs.create(annotation(), ACME)
    globex = Caller(tenant="globex")
    with pytest.raises(NotFound):
        await fleet.gateway.deletions.delete_job(job.name, globex)
    with pytest.raises(NotFound):
        await fleet.gateway.deletions.delete_blob("globex", job.blobs[0].digest, globex)
    with pytest.raises(PermissionDenied):
        await fleet.gateway.keys.create(globex, tenant="acme", role=KeyRole.READ, note="", ttl_s=0.0)
