"""What a disk adds to the BlobStore's promises: restarts, full disks, names that lead elsewhere, the sweep."""

import asyncio
import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fanlight.contract.names import digest_of
from fanlight.errors import InvalidField, NodeFault, Unavailable
from services.gateway.adapters import blob_files, disk_blobs
from services.gateway.adapters.disk_blobs import DiskBlobs
from services.kernel.blobs import BlobInfo

SCOPE = "default"


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def opened(root: Path) -> DiskBlobs:
    return DiskBlobs(root, budget_bytes=10_000, blob_limit_bytes=5_000)


async def settled(store: DiskBlobs, data: bytes) -> BlobInfo:
    info = await store.write(SCOPE, once(data))
    assert await store.settle(SCOPE, info.digest) == info
    return info


def incoming(root: Path) -> list[Path]:
    return list((root / ".incoming").iterdir())


async def test_blobs_and_their_bytes_are_counted_again_after_a_restart(tmp_path: Path) -> None:
    info = await opened(tmp_path).write(SCOPE, once(b"kept"))
    again = opened(tmp_path)
    assert again.used_bytes == 4
    assert await again.stat(SCOPE, info.digest) == info


async def test_what_a_killed_process_left_half_written_is_removed_at_the_start(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / ".incoming" / "left").write_bytes(b"half")
    assert opened(tmp_path).used_bytes == 0
    assert incoming(tmp_path) == []


async def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    opened(tmp_path)
    with (tmp_path / ".incoming" / "busy").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opened(tmp_path)
        assert len(incoming(tmp_path)) == 1


async def test_nothing_half_written_stays_behind_a_finished_write(tmp_path: Path) -> None:
    store = opened(tmp_path)
    await settled(store, b"kept")
    await settled(store, b"kept")
    assert incoming(tmp_path) == []


@pytest.mark.parametrize("scope", ["../elsewhere", ".incoming", "a/b"])
async def test_a_scope_that_leads_elsewhere_is_refused(tmp_path: Path, scope: str) -> None:
    with pytest.raises(InvalidField):
        await opened(tmp_path).write(scope, once(b"x"))
    with pytest.raises(InvalidField):
        await opened(tmp_path).stat(scope, digest_of(b"x"))


async def test_a_digest_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField):
        await opened(tmp_path).stat(SCOPE, "sha256:../../../etc/passwd")


@pytest.mark.parametrize(
    ("number", "wanted"), [(errno.ENOSPC, Unavailable), (errno.EIO, Unavailable), (errno.EACCES, NodeFault)]
)
async def test_an_error_of_the_disk_becomes_one_of_ours_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wanted: type[Exception]
) -> None:
    store = opened(tmp_path)

    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(blob_files.os, "fsync", fail)
    with pytest.raises(wanted):
        await store.write(SCOPE, once(b"data"), settled=True)
    assert store.used_bytes == 0
    assert incoming(tmp_path) == []
    assert await store.stat(SCOPE, digest_of(b"data")) is None


def age(root: Path, digest: str) -> None:
    """Date its last use to the year 1970."""
    name = digest.removeprefix("sha256:")
    os.utime(root / SCOPE / name[:2] / name[2:], (1_000.0, 1_000.0))


async def sweep(store: DiskBlobs, *needed: str) -> int:
    return await store.sweep(older_than_s=100.0, now_s=1_200.0, keep=lambda _, digest: digest in needed)


async def test_an_old_blob_is_swept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    age(tmp_path, (await store.write(SCOPE, once(b"old"))).digest)
    assert await sweep(store) == 1
    assert store.used_bytes == 0


@pytest.mark.parametrize("use", ["write", "stat", "need"])
async def test_an_old_blob_that_is_used_again_is_young(tmp_path: Path, use: str) -> None:
    store = opened(tmp_path)
    digest = (await settled(store, b"again")).digest
    age(tmp_path, digest)
    # One that does not remember having written it just now.
    store = opened(tmp_path)
    if use == "write":
        await store.write(SCOPE, once(b"again"))
    elif use == "stat":
        await store.stat(SCOPE, digest)
    else:
        assert await sweep(store, digest) == 0
    assert await sweep(store) == 0
    assert await store.stat(SCOPE, digest) is not None


def file_of(root: Path, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return root / SCOPE / name[:2] / name[2:]


class SlowDisk:
    """Stands for os.fsync; syncs wait until they are let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may = threading.Event()
        self.synced = 0
        monkeypatch.setattr(blob_files.os, "fsync", self._sync)

    def _sync(self, fd: int) -> None:
        assert self.may.wait(30.0)
        self.synced += 1


async def test_a_blob_can_be_read_before_the_disk_has_it_and_counted_on_only_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    # The folders of its scope.
    await settled(store, b"first")
    disk = SlowDisk(monkeypatch)
    info = await store.write(SCOPE, once(b"data"))
    assert b"".join([chunk async for chunk in store.read(SCOPE, info.digest)]) == b"data"
    settling = asyncio.create_task(store.settle(SCOPE, info.digest))
    await asyncio.wait({settling}, timeout=0.05)
    assert not settling.done()
    disk.may.set()
    assert await settling == info
    assert disk.synced == 1


async def test_what_another_process_has_not_settled_is_settled_before_it_is_counted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await settled(opened(tmp_path), b"data")
    os.link(file_of(tmp_path, info.digest), tmp_path / ".incoming" / "elsewhere")
    disk = SlowDisk(monkeypatch)
    disk.may.set()
    with (tmp_path / ".incoming" / "elsewhere").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store = opened(tmp_path)
        assert await store.stat(SCOPE, info.digest) == info
        assert disk.synced == 0
        assert await store.settle(SCOPE, info.digest) == info
        assert disk.synced == 1


@pytest.mark.parametrize("left", [b"da", b"data"])
async def test_after_a_power_cut_a_blob_is_there_whole_or_not_at_all(tmp_path: Path, left: bytes) -> None:
    info = await settled(opened(tmp_path), b"data")
    path = file_of(tmp_path, info.digest)
    os.link(path, tmp_path / ".incoming" / "unsettled")
    path.write_bytes(left)
    store = opened(tmp_path)
    assert (await store.stat(SCOPE, info.digest) is not None) == (left == b"data")
    assert store.used_bytes == (4 if left == b"data" else 0)
    assert incoming(tmp_path) == []


async def test_a_file_system_that_knows_one_name_a_file_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(blob_files.os, "link", refuse)
    store = opened(tmp_path)
    info = await settled(store, b"data")
    assert await settled(store, b"data") == info
    assert await opened(tmp_path).stat(SCOPE, info.digest) == info
    assert incoming(tmp_path) == []


async def test_a_blob_that_the_disk_lost_while_two_wrote_it_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    await settled(store, b"first")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(blob_files.os, "fsync", fail)
    infos = await asyncio.gather(*(store.write(SCOPE, once(b"data")) for _ in range(2)))
    with contextlib.suppress(Unavailable):
        assert await store.settle(SCOPE, infos[0].digest) is None
    store.close()
    assert not file_of(tmp_path, infos[0].digest).exists()
    assert store.used_bytes == 5
    assert incoming(tmp_path) == []


async def test_a_file_that_cannot_be_swept_stops_no_other_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    digests = [(await settled(store, data)).digest for data in (b"one", b"two", b"three")]
    for digest in digests:
        age(tmp_path, digest)
    stuck, unlink = file_of(tmp_path, digests[1]), Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise OSError(errno.EIO, "gone")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(Unavailable):
        await sweep(store)
    assert [file_of(tmp_path, digest).exists() for digest in digests] == [False, True, False]


async def test_what_a_power_cut_spoilt_is_found_though_the_next_start_is_cut_short_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await settled(opened(tmp_path), b"data")
    path = file_of(tmp_path, info.digest)
    os.link(path, tmp_path / ".incoming" / "unsettled")
    path.write_bytes(b"da")

    def killed(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blob_files, "_digest_of", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path)
    assert await opened(tmp_path).stat(SCOPE, info.digest) is None
    assert incoming(tmp_path) == []


async def test_a_writer_that_is_cancelled_while_the_disk_fails_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    await settled(store, b"first")
    publishing, may = threading.Event(), threading.Event()
    publish = store._files.publish

    def slowly(*given: Any) -> bool:
        publishing.set()
        assert may.wait(30.0)
        return publish(*given)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(store._files, "publish", slowly)
    monkeypatch.setattr(blob_files.os, "fsync", fail)
    writing = asyncio.create_task(store.write(SCOPE, once(b"data")))
    assert await asyncio.to_thread(publishing.wait, 30.0)
    writing.cancel()
    may.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert not file_of(tmp_path, digest_of(b"data")).exists()
    assert incoming(tmp_path) == []


async def test_what_waits_in_memory_for_a_slow_disk_counts_until_the_disk_has_taken_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    await settled(store, b"first")
    publishing, may, sent = threading.Event(), threading.Event(), asyncio.Event()
    publish = store._files.publish

    def slowly(*given: Any) -> bool:
        publishing.set()
        assert may.wait(30.0)
        return publish(*given)

    async def in_two_parts() -> AsyncIterator[bytes]:
        yield b"b" * 600
        sent.set()
        await asyncio.to_thread(may.wait, 30.0)
        yield b"b"

    monkeypatch.setattr(store._files, "publish", slowly)
    monkeypatch.setattr(disk_blobs, "BUFFER_LIMIT_BYTES", 3_000)
    writing = [asyncio.create_task(store.write(SCOPE, once(b"a" * 2_500)))]
    assert await asyncio.to_thread(publishing.wait, 30.0)
    writing.append(asyncio.create_task(store.write(SCOPE, in_two_parts())))
    await asyncio.wait_for(sent.wait(), 30.0)
    try:
        assert len(incoming(tmp_path)) == 2, "the second one does not wait in memory too"
    finally:
        may.set()
    await asyncio.gather(*writing)
    assert store._buffered_bytes == 0


@pytest.mark.parametrize("call", ["stat", "read"])
async def test_a_blob_that_cannot_be_opened_raises_one_of_our_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    digest = (await settled(opened(tmp_path), b"data")).digest
    store = opened(tmp_path)

    def refuse(*given: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(Unavailable):
        await (store.stat(SCOPE, digest) if call == "stat" else anext(store.read(SCOPE, digest)))
