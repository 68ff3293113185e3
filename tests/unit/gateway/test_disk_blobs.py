"""What a disk adds to the BlobStore's promises: restarts, full disks, names that lead elsewhere, the sweep."""

import errno
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.gateway.adapters import blob_files
from services.gateway.adapters.disk_blobs import DiskBlobs
from services.kernel.digests import digest_of
from services.kernel.errors import InvalidField, NodeFault, ResourceExhausted

SCOPE = "default"


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def opened(root: Path) -> DiskBlobs:
    return DiskBlobs(root, budget_bytes=10_000, blob_limit_bytes=5_000)


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
    await store.write(SCOPE, once(b"kept"))
    await store.write(SCOPE, once(b"kept"))
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
    ("number", "wanted"), [(errno.ENOSPC, ResourceExhausted), (errno.EDQUOT, ResourceExhausted), (errno.EIO, NodeFault)]
)
async def test_a_disk_that_fails_is_told_in_our_words_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wanted: type[Exception]
) -> None:
    store = opened(tmp_path)

    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(blob_files.os, "fsync", fail)
    with pytest.raises(wanted):
        await store.write(SCOPE, once(b"data"))
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
    digest = (await store.write(SCOPE, once(b"again"))).digest
    age(tmp_path, digest)
    if use == "write":
        await store.write(SCOPE, once(b"again"))
    elif use == "stat":
        await store.stat(SCOPE, digest)
    else:
        assert await sweep(store, digest) == 0
    assert await sweep(store) == 0
    assert await store.stat(SCOPE, digest) is not None
