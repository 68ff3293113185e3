"""A folder of blobs that is removed, replaced, full or open to others."""

import errno
import os
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fanlight.contract.names import digest_of
from fanlight.errors import Unavailable
from services.gateway.adapters import blob_files
from services.gateway.adapters.disk_blobs import DiskBlobs, open_disk_blobs
from services.gateway.app.job_store import ABSENT_DIGEST, StoreProbe
from services.gateway.app.records import Records
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore
from tests.fakes.small_disks import fill, tmpfs

LIMITS = {"budget_bytes": 10**9, "blob_limit_bytes": 10**8}


@pytest.fixture
async def blobs(tmp_path: Path) -> AsyncIterator[DiskBlobs]:
    async with open_disk_blobs(tmp_path / "blobs", **LIMITS) as opened:
        yield opened


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def replaced(root: Path) -> None:
    root.rename(root.with_name("old"))
    root.mkdir()


@pytest.mark.parametrize("lose", [shutil.rmtree, replaced, lambda root: root.rename(root.with_name("away"))])
async def test_nothing_is_written_to_or_read_from_a_folder_that_is_lost(
    lose: Callable[[Path], None], blobs: DiskBlobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = await blobs.write("default", once(b"before"), settled=True)
    probe = StoreProbe(Records(MemoryStore(), FakeClock()), FakeClock(), blobs)
    await probe.write()
    lose(tmp_path / "blobs")
    with pytest.raises(Unavailable, match="was removed or replaced; put it back") as caught:
        await blobs.write("default", once(b"after"))
    assert caught.value.retry_after_s == 30.0
    for call in (blobs.stat("default", info.digest), blobs.settle("default", info.digest)):
        with pytest.raises(Unavailable, match="was removed or replaced"):
            await call
    with pytest.raises(Unavailable, match="was removed or replaced"):
        [chunk async for chunk in blobs.read("default", info.digest)]
    with pytest.raises(Unavailable, match="the folder of blobs"):
        await probe.write()
    assert capsys.readouterr().out.count("blobs_lost") == 1


async def test_a_lost_folder_is_noticed_though_nobody_uses_it(blobs: DiskBlobs, tmp_path: Path) -> None:
    info = await blobs.write("default", once(b"before"), settled=True)
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(Unavailable):
        await blobs.stat("default", ABSENT_DIGEST)
    with pytest.raises(Unavailable):
        await blobs.settle("default", info.digest)


async def test_a_folder_that_is_put_back_is_used_again(blobs: DiskBlobs, tmp_path: Path) -> None:
    info = await blobs.write("default", once(b"before"), settled=True)
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(Unavailable):
        await blobs.stat("default", ABSENT_DIGEST)
    (tmp_path / "away").rename(tmp_path / "blobs")
    assert await blobs.stat("default", ABSENT_DIGEST) is None
    assert blobs.fault == ""
    assert await blobs.settle("default", info.digest) == info


async def test_a_folder_whose_content_was_deleted_takes_blobs_again(blobs: DiskBlobs, tmp_path: Path) -> None:
    await blobs.write("default", once(b"before"), settled=True)
    for each in (tmp_path / "blobs").iterdir():
        shutil.rmtree(each)
    info = await blobs.write("default", once(b"after"), settled=True)
    assert info.digest == digest_of(b"after")


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
async def test_a_disk_that_takes_no_bytes_is_a_fault_until_it_takes_some(
    number: int, words: str, blobs: DiskBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as full:
        full.setattr(blob_files, "private", fails)
        with pytest.raises(Unavailable, match=words) as caught:
            await blobs.write("default", once(b"data"))
    assert caught.value.retry_after_s == 60.0
    assert words in blobs.fault
    await blobs.write("default", once(b"data"))
    assert blobs.fault == ""


async def test_a_full_disk_is_not_ready_until_there_is_room_again(tmp_path: Path) -> None:
    clock = FakeClock()
    with tmpfs(tmp_path / "disk") as disk:
        root = disk / "blobs"
        async with open_disk_blobs(root, **LIMITS) as blobs:
            probe = StoreProbe(Records(MemoryStore(), clock), clock, blobs)
            info = await blobs.write("default", once(b"before" * 100_000), settled=True)
            await probe.write()
            something_else = fill(disk)
            clock.advance(100.0)
            for _ in range(2):
                with pytest.raises(Unavailable, match=f"the disk for blobs is full .{root}."):
                    await probe.write()
            with pytest.raises(Unavailable, match=f"the disk for blobs is full .{root}.") as caught:
                await blobs.write("default", once(b"after" * 100_000))
            assert caught.value.retry_after_s == 60.0
            assert b"".join([chunk async for chunk in blobs.read("default", info.digest)]) == b"before" * 100_000
            something_else.unlink()
            await probe.write()
            assert blobs.fault == ""
            await blobs.write("default", once(b"after" * 100_000))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
async def test_blobs_are_read_from_a_disk_that_takes_no_bytes(
    number: int, blobs: DiskBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"before" * 100_000
    info = await blobs.write("default", once(data), settled=True)

    def fails(path: object, *times: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(blob_files.os, "utime", fails)
    blobs._recent.clear()
    assert await blobs.stat("default", info.digest) == info
    assert b"".join([chunk async for chunk in blobs.read("default", info.digest)]) == data


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENFILE])
async def test_a_fault_that_may_pass_names_the_folder_and_when_to_try_again(
    number: int, blobs: DiskBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(blob_files, "private", fails)
    with pytest.raises(Unavailable, match=str(tmp_path / "blobs")) as caught:
        await blobs.write("default", once(b"data"))
    assert caught.value.retry_after_s == 60.0
    assert blobs.fault == ""


async def test_a_full_disk_does_not_stop_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str, flags: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(blob_files, "private", fails)
    async with open_disk_blobs(tmp_path / "blobs", **LIMITS) as blobs:
        assert "is full" in blobs.fault


async def test_the_folder_and_its_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        root = tmp_path / "blobs"
        async with open_disk_blobs(root, **LIMITS) as blobs:
            await blobs.write("default", once(b"data"), settled=True)
            assert open_to_others(root) == []
        for each in (root, *root.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o644)
        async with open_disk_blobs(root, **LIMITS):
            assert open_to_others(root) == []
    finally:
        os.umask(before)


def open_to_others(root: Path) -> list[Path]:
    return [each for each in (root, *root.rglob("*")) if stat.S_IMODE(each.stat().st_mode) & 0o077]
