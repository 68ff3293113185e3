"""A file of the store that is deleted, replaced, truncated, overwritten or full: a clear error, and no lost write."""

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fanlight.errors import Unavailable
from services.gateway.adapters import sqlite_store
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.job_store import PROBE_INTERVAL_S
from services.gateway.ports import CaughtUp
from services.kernel.config import SettingsError
from tests.fakes.fleet import Fleet
from tests.fakes.small_disks import fill, tmpfs

NAME = "gateway.sqlite"


@pytest.fixture(autouse=True)
def calls_that_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time, not after a while."""
    monkeypatch.setattr(sqlite_store, "CHECK_READS_S", 0.0)
    monkeypatch.setattr(sqlite_store, "CHECK_WRITES_S", 0.0)


def wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def replace_by_copy(path: Path) -> None:
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def overwrite_by_other(path: Path) -> None:
    """In place, by a database of the same kind that is as large."""
    other = path.with_name("other")
    shutil.copyfile(path, other)
    with sqlite3.connect(other) as connection:
        connection.execute("PRAGMA application_id = 77")
    connection.close()
    path.write_bytes(other.read_bytes().ljust(path.stat().st_size, b"\0"))


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (Path.unlink, f"{NAME} was deleted"),
        (lambda path: shutil.rmtree(path.parent), f"{NAME} was deleted"),
        (replace_by_copy, f"{NAME} was replaced"),
        (lambda path: path.write_bytes(b""), f"{NAME} was truncated"),
        (lambda path: path.write_bytes(b"x" * 1_000_000), f"{NAME} was overwritten"),
        (overwrite_by_other, f"{NAME} was overwritten"),
        (lambda path: wal_of(path).unlink(), f"{NAME}-wal was deleted"),
        (lambda path: wal_of(path).write_bytes(b""), f"{NAME}-wal was truncated"),
        (lambda path: replace_by_copy(wal_of(path)), f"{NAME}-wal was replaced"),
    ],
)
async def test_nothing_is_written_into_a_file_that_is_lost(
    lose: Callable[[Path], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data" / NAME
    async with open_sqlite_store(path) as store:
        made = await store.create("jobs", "a", b"1")
        assert store.fault == ""
        lose(path)
        for call in (
            store.create("jobs", "b", b"2"),
            store.put("jobs", "a", b"2", revision=made.revision),
            store.delete("jobs", "a"),
            store.get("jobs", "a"),
            store.list("jobs", limit=9),
        ):
            with pytest.raises(Unavailable, match=f"{words} while the gateway uses it; stop the gateway") as caught:
                await call
            assert caught.value.retry_after_s
        assert words in store.fault
    assert capsys.readouterr().out.count("store_file_lost") == 1


async def test_a_file_that_is_put_back_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / NAME
    async with open_sqlite_store(path) as store:
        await store.create("jobs", "a", b"1")
        path.rename(tmp_path / "away")
        with pytest.raises(Unavailable, match="was deleted"):
            await store.create("jobs", "b", b"2")
        (tmp_path / "away").rename(path)
        await store.create("jobs", "b", b"3")
        assert store.fault == ""
    async with open_sqlite_store(path) as store:
        assert [record.value for record in await store.list("jobs", limit=9)] == [b"3", b"1"]


async def test_a_file_with_many_checkpoints_is_never_taken_for_lost(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / NAME) as store:
        for number in range(40):
            await store.create("jobs", f"{number:03}", b"x" * 200_000)
            if number % 2:
                await store.delete("jobs", f"{number:03}")
        assert store.fault == ""
        assert len(await store.list("jobs", limit=99)) == 20


def spoiled(path: Path) -> None:
    """A sound header, and pages that are not."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE records (bucket, key, revision INTEGER, value, PRIMARY KEY (bucket, key))")
        connection.executemany(
            "INSERT INTO records VALUES ('jobs', ?, ?, ?)", [(str(i), i, b"x" * 3000) for i in range(50)]
        )
    connection.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 9] = b"\xff" * (4096 * 6)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda path: path.write_bytes(b"garbage" * 1000),
            "file is not a database; put it back from a backup, or move",
        ),
        (spoiled, "put it back from a backup, or move it away"),
        (Path.mkdir, r"unable to open database file; is the data folder writable \(FANLIGHT_GATEWAY_DATA_DIR\)"),
        (lambda path: path.symlink_to("/proc/none/none"), "is the data folder writable"),
    ],
    ids=["garbage", "damaged pages", "a folder", "nowhere"],
)
async def test_a_file_that_cannot_be_used_ends_the_start_in_one_line(
    make: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    make(tmp_path / NAME)
    with pytest.raises(SettingsError, match=words) as caught:
        async with open_sqlite_store(tmp_path / NAME):
            pass
    assert "\n" not in str(caught.value)


async def test_a_folder_that_cannot_be_made_ends_the_start_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be opened: File exists; is the data folder writable"):
        async with open_sqlite_store(tmp_path / "file" / NAME):
            pass


async def test_a_full_disk_refuses_writes_and_takes_them_again(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / NAME) as store:
        await store.create("jobs", "a", b"1")
        connection = store._file._connection
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(store._executor, connection.execute, "PRAGMA max_page_count = 4")
        with pytest.raises(Unavailable, match="the store cannot write: database or disk is full") as caught:
            await store.create("jobs", "b", b"x" * 1_000_000)
        assert caught.value.retry_after_s == 5.0
        assert await store.get("jobs", "a")
        await loop.run_in_executor(store._executor, connection.execute, "PRAGMA max_page_count = 100000")
        await store.create("jobs", "b", b"x" * 1_000_000)


async def test_a_store_on_a_full_disk_is_read_and_takes_writes_when_there_is_room(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk") as disk:
        async with open_sqlite_store(disk / NAME) as store:
            await store.create("jobs", "a", b"1")
            something_else = fill(disk)
            with pytest.raises(Unavailable, match=f"the store cannot write: .* .{disk / NAME}.") as caught:
                await store.create("jobs", "b", b"x" * 1_000_000)
            assert caught.value.retry_after_s
            assert await store.get("jobs", "a")
            something_else.unlink()
            await store.create("jobs", "b", b"x" * 1_000_000)


async def test_a_watch_goes_on_when_the_store_works_again(tmp_path: Path) -> None:
    path = tmp_path / NAME
    async with open_sqlite_store(path) as store, asyncio.timeout(30):
        await store.create("jobs", "a", b"1")
        path.rename(tmp_path / "away")
        changes = store.watch("jobs")
        first = asyncio.create_task(anext(changes))
        with pytest.raises(Unavailable):
            await store.get("jobs", "a")
        (tmp_path / "away").rename(path)
        assert getattr(await first, "key", None) == "a"
        assert await anext(changes) == CaughtUp()


async def test_a_gateway_whose_file_is_lost_is_not_ready_though_nobody_wrote(tmp_path: Path) -> None:
    path = tmp_path / NAME
    async with open_sqlite_store(path) as store:
        fleet = Fleet(store=store)  # type: ignore[arg-type]
        async with fleet.running():
            await fleet.gateway.probe.write()
            path.unlink()
            await fleet.gateway._probe()
            with pytest.raises(Unavailable, match="was deleted") as caught:
                await fleet.gateway.probe.write()
            assert caught.value.retry_after_s == PROBE_INTERVAL_S
