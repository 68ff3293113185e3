"""Sealed stores over stores that held data in clear, that were damaged, or whose tenant is gone."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fanlight.contract.names import digest_of
from fanlight.errors import Conflict, NotFound
from services.gateway.adapters.disk_blobs import DiskBlobs
from services.gateway.adapters.seal_format import CHUNK_BYTES, STORED_CHUNK_BYTES, UnreadableBlob
from services.gateway.adapters.sealed_blobs import SealedBlobs, sealed_blobs
from services.gateway.adapters.sealed_store import SealedStore
from services.gateway.app.contents import tenant_of
from services.gateway.app.data_keys import RETIRED_S, DataKeys, TenantClosed
from services.gateway.app.job_store import JOBS, JOBS_BUCKET
from services.gateway.app.records import Records, UnreadableRecord
from services.gateway.app.sealing import Sealing
from services.gateway.domain import plan
from services.gateway.domain.job import Job
from services.gateway.ports import CaughtUp, DirectTransfer, NewRecord
from tests.fakes.fleet import FakeClock, annotation, plan_of
from tests.fakes.memory_store import MemoryStore
from tests.fakes.sealing import data_keys

IMAGE = bytes(range(256)) * 1_500


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def keys(tmp_path: Path, clock: FakeClock) -> DataKeys:
    return data_keys(tmp_path / "keys", clock=clock)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


def disk(folder: Path) -> DiskBlobs:
    """Opened again for each test's step, so that nothing comes from its memory."""
    return DiskBlobs(folder, budget_bytes=10_000_000, blob_limit_bytes=1_000_000)


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def all_of(blobs: SealedBlobs, digest: str, scope: str = "acme", **span: int) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(scope, digest, **span)])


def file_of(folder: Path, scope: str = "acme") -> Path:
    (found,) = (folder / scope).glob("*/*")
    return found


def job_of(job_id: str) -> Job:
    return plan.create(plan_of(annotation()), job_id=job_id, request_id="", priority=0, now_s=1_000.0)


# Records


async def test_records_are_sealed_for_the_tenant_that_their_content_names(keys: DataKeys) -> None:
    under, value = MemoryStore(), b'{"version":2,"value":{"tenant":"acme","prompt":"a red teapot"}}'
    store = SealedStore(under, keys)
    made = await store.create("jobs", "a", value, after=NewRecord(bucket="requests", key="r", value=b'{"teapot":1}'))
    await store.create("control_images", "c", b'{"version":2,"value":{"blob":{"scope":"other"}}}')
    await store.create("workers", "w", b'{"teapot":1}')
    stored = {bucket: (await under.list(bucket, limit=1))[0].value for bucket in ("jobs", "requests", "workers")}
    assert [b"teapot" in each for each in stored.values()] == [False, False, True]
    assert made.seal is not None
    assert made.seal.tenant == "acme"
    request, cached = await store.get("requests", "r"), await store.get("control_images", "c")
    assert request is not None
    assert request.seal is not None
    assert cached is not None
    assert cached.seal is not None
    assert (request.value, request.seal.tenant, cached.seal.tenant) == (b'{"teapot":1}', "acme", "other")


def test_a_value_that_names_no_tenant_is_the_operators() -> None:
    for value in (b"", b"\xff", b"[]", b'{"value":{}}', b'{"value":{"tenant":7}}'):
        assert tenant_of(value) == "default"


async def test_a_prompt_that_looks_like_a_tenant_changes_nothing() -> None:
    value = JOBS.encode(job_of("1")).replace(b'"requests":', b'"note":"\\"tenant\\":\\"evil\\"","requests":')
    assert tenant_of(value) == "default"


async def test_a_record_in_clear_is_read_and_sealed_when_it_is_next_written(keys: DataKeys) -> None:
    under = MemoryStore()
    before = await under.create("jobs", "a", b'{"teapot":1}')
    store = SealedStore(under, keys)
    assert await store.get("jobs", "a") == before
    report = await Sealing(keys, store, None).report()  # type: ignore[arg-type]  # no blobs
    assert report.clear_records == 1
    await store.put("jobs", "a", b'{"teapot":2}', revision=before.revision)
    stored = await under.get("jobs", "a")
    assert stored is not None
    assert b"teapot" not in stored.value
    assert (await Sealing(keys, store, None).report()).clear_records == 0  # type: ignore[arg-type]  # no blobs


@pytest.mark.parametrize("damage", [lambda v: v[:-1], lambda v: v[:20], lambda v: v[:-1] + bytes([v[-1] ^ 1])])
async def test_a_damaged_record_is_set_aside_and_stops_no_list_and_no_watch(keys: DataKeys, damage) -> None:
    under = MemoryStore()
    store = SealedStore(under, keys)
    for job_id in ("1", "2"):
        await store.create(JOBS_BUCKET, job_id, JOBS.encode(job_of(job_id)))
    stored = await under.get(JOBS_BUCKET, "1")
    assert stored is not None
    await under.put(JOBS_BUCKET, "1", damage(stored.value), revision=stored.revision)
    records = Records(store, FakeClock())
    values = [records.read(JOBS, JOBS_BUCKET, each) for each in await records.list(JOBS_BUCKET, limit=9)]
    assert [each.id if each else None for each in values] == ["2", None]
    seen = []
    async for change in records.watch(JOBS_BUCKET):
        if isinstance(change, CaughtUp):
            break
        seen.append(change)
    assert len(seen) == 2
    (damaged,) = await records.damaged_page(before="", limit=9)
    assert damaged.name == "jobs/1"
    assert "seal" in damaged.why
    await records.remove_damaged(JOBS_BUCKET, "1")


async def test_a_record_that_was_moved_to_another_key_is_damaged(keys: DataKeys) -> None:
    under = MemoryStore()
    store = SealedStore(under, keys)
    await store.create("jobs", "a", b"1")
    stored = await under.get("jobs", "a")
    assert stored is not None
    await under.create("jobs", "b", stored.value)
    moved = await store.get("jobs", "b")
    assert moved is not None
    assert "another key or place" in moved.fault


async def test_what_another_gateway_sealed_with_a_key_of_a_moment_ago_is_read(tmp_path: Path) -> None:
    under = MemoryStore()
    ours, theirs = (SealedStore(under, data_keys(tmp_path / "keys")) for _ in range(2))
    await ours.create("jobs", "a", b"1")
    assert (await theirs.list("jobs", limit=1))[0].value == b"1"
    await ours._keys.rotate("default")
    await ours.create("jobs", "b", b"2")
    assert (await theirs.list("jobs", limit=1))[0].value == b"2"


async def test_records_of_a_destroyed_key_cannot_be_read_nor_written(keys: DataKeys) -> None:
    store = SealedStore(MemoryStore(), keys)
    value = b'{"version":2,"value":{"tenant":"acme"}}'
    made = await store.create("jobs", "a", value)
    await keys.destroy("acme")
    found = await store.get("jobs", "a")
    assert found is not None
    assert "destroyed" in found.fault
    with pytest.raises(UnreadableRecord):
        Records(store, FakeClock()).decode(JOBS, "jobs", found)
    with pytest.raises(Conflict):
        await store.put("jobs", "a", value, revision=made.revision)
    with pytest.raises(TenantClosed):
        await store.create("jobs", "b", value)


async def test_an_older_data_key_stays_until_neither_records_nor_blobs_have_it(
    keys: DataKeys, clock: FakeClock, folder: Path
) -> None:
    store, blobs = SealedStore(MemoryStore(), keys), sealed_blobs(disk(folder), keys)
    sealing = Sealing(keys, store, blobs)
    record = await store.create("jobs", "a", b"1")
    info = await blobs.write("default", chunks(IMAGE))
    await sealing.rotate("default")

    async def older() -> int:
        clock.advance(RETIRED_S + 1)
        await sealing.sweep()
        return (await sealing.report()).tenants[0].older

    assert await older() == 1
    await store.put("jobs", "a", b"2", revision=record.revision)
    assert await older() == 1
    await blobs.delete("default", info.digest)
    assert await older() == 0


# Blobs


async def test_no_byte_of_a_blob_lies_on_the_disk_in_clear(keys: DataKeys, folder: Path) -> None:
    info = await sealed_blobs(disk(folder), keys).write("acme", chunks(b"a red teapot " * 9_000))
    assert b"teapot" not in file_of(folder).read_bytes()
    assert await all_of(sealed_blobs(disk(folder), keys), info.digest) == b"a red teapot " * 9_000


async def test_a_part_of_a_blob_costs_its_chunks_alone(keys: DataKeys, folder: Path) -> None:
    info = await sealed_blobs(disk(folder), keys).write("acme", chunks(IMAGE))
    # All chunks but the third are ruined.
    path = file_of(folder)
    stored = bytearray(path.read_bytes())
    for index in (0, 1, 3, 4):
        stored[index * STORED_CHUNK_BYTES] ^= 1
    path.write_bytes(stored)
    blobs = sealed_blobs(disk(folder), keys)
    start = 2 * CHUNK_BYTES
    assert await all_of(blobs, info.digest, offset_bytes=start, limit_bytes=CHUNK_BYTES) == IMAGE[start:][:CHUNK_BYTES]
    assert await all_of(blobs, info.digest, offset_bytes=start + 9, limit_bytes=5) == IMAGE[start + 9 :][:5]
    for offset_bytes in (0, start - 1, start + 1):
        with pytest.raises(UnreadableBlob, match="was changed"):
            await all_of(blobs, info.digest, offset_bytes=offset_bytes, limit_bytes=CHUNK_BYTES)


@pytest.mark.parametrize("span", [(0, 1), (65_535, 2), (65_536, 65_536), (131_071, 131_073), (383_999, 0), (1, 0)])
async def test_parts_across_chunks_are_what_they_are_in_the_whole(
    keys: DataKeys, folder: Path, span: tuple[int, int]
) -> None:
    info = await sealed_blobs(disk(folder), keys).write("acme", chunks(IMAGE))
    offset_bytes, limit_bytes = span
    end = offset_bytes + limit_bytes if limit_bytes else len(IMAGE)
    blobs = sealed_blobs(disk(folder), keys)
    assert (
        await all_of(blobs, info.digest, offset_bytes=offset_bytes, limit_bytes=limit_bytes) == IMAGE[offset_bytes:end]
    )


@pytest.mark.parametrize("cut", [1, 100, 70_000])
async def test_a_truncated_blob_is_written_again(keys: DataKeys, folder: Path, cut: int) -> None:
    info = await sealed_blobs(disk(folder), keys).write("acme", chunks(IMAGE))
    path = file_of(folder)
    path.write_bytes(path.read_bytes()[cut:])
    blobs = sealed_blobs(disk(folder), keys)
    assert await blobs.stat("acme", info.digest) is None
    with pytest.raises(UnreadableBlob):
        await all_of(blobs, info.digest)
    await blobs.write("acme", chunks(IMAGE))
    assert await all_of(sealed_blobs(disk(folder), keys), info.digest) == IMAGE


async def test_the_blob_of_another_name_or_tenant_is_not_this_one(keys: DataKeys, folder: Path) -> None:
    blobs = sealed_blobs(disk(folder), keys)
    info = await blobs.write("acme", chunks(IMAGE))
    other = await blobs.write("acme", chunks(b"other"))
    theirs = await blobs.write("else", chunks(b"theirs"))
    paths = BlobPaths(folder)
    paths.of("acme", info.digest).write_bytes(paths.of("acme", other.digest).read_bytes())
    paths.of("else", theirs.digest).write_bytes(paths.of("acme", other.digest).read_bytes())
    blobs = sealed_blobs(disk(folder), keys)
    assert await blobs.stat("acme", info.digest) is None
    assert await blobs.stat("else", theirs.digest) is None


class BlobPaths:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, scope: str, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self._folder / scope / name[:2] / name[2:]


async def test_a_blob_in_clear_is_read_reported_and_sealed_when_it_is_next_written(
    keys: DataKeys, folder: Path
) -> None:
    info = await disk(folder).write("acme", chunks(IMAGE), settled=True)
    blobs = sealed_blobs(disk(folder), keys)
    assert await blobs.stat("acme", info.digest) == info
    assert await all_of(blobs, info.digest) == IMAGE
    assert await all_of(blobs, info.digest, offset_bytes=7, limit_bytes=5) == IMAGE[7:12]
    assert (await blobs.count_seals()).clear == 1
    await blobs.write("acme", chunks(IMAGE))
    assert (await blobs.count_seals()).clear == 0
    assert IMAGE[:1_000] not in file_of(folder).read_bytes()
    assert await all_of(sealed_blobs(disk(folder), keys), info.digest) == IMAGE


async def test_bytes_in_clear_that_are_not_their_digests_are_not_given_whole(keys: DataKeys, folder: Path) -> None:
    info = await disk(folder).write("acme", chunks(IMAGE), settled=True)
    file_of(folder).write_bytes(IMAGE[:-1] + b"x")
    with pytest.raises(UnreadableBlob, match="not those of its digest"):
        await all_of(sealed_blobs(disk(folder), keys), info.digest)


async def test_a_power_cut_that_lost_bytes_is_found_at_the_next_start_without_a_key(
    keys: DataKeys, folder: Path
) -> None:
    info = await sealed_blobs(disk(folder), keys).write("acme", chunks(IMAGE), settled=True)
    path = file_of(folder)
    leftover = folder / ".incoming" / "left"
    leftover.hardlink_to(path)
    disk(folder)
    assert path.exists()
    leftover.hardlink_to(path)
    with path.open("r+b") as file:
        file.seek(8_192)
        file.write(bytes(4_096))
    disk(folder)
    assert not path.exists()
    assert info.digest == digest_of(IMAGE)


async def test_sealed_blobs_offer_no_addresses_that_bypass_the_gateway(keys: DataKeys, folder: Path) -> None:
    assert not isinstance(sealed_blobs(disk(folder), keys), DirectTransfer)


async def test_a_blob_of_a_destroyed_key_is_absent_even_from_a_backup(keys: DataKeys, folder: Path) -> None:
    blobs = sealed_blobs(disk(folder), keys)
    info = await blobs.write("acme", chunks(IMAGE), settled=True)
    backup = file_of(folder).read_bytes()
    await keys.destroy("acme")
    assert (await blobs.erase("acme")).blobs == 1
    path = BlobPaths(folder).of("acme", info.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(backup)
    restored = sealed_blobs(disk(folder), keys)
    assert await restored.stat("acme", info.digest) is None
    with pytest.raises((UnreadableBlob, NotFound)):
        await all_of(restored, info.digest)
