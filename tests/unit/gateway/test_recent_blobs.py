"""What was just written is read from memory, bounded in bytes and in time."""

from services.gateway.adapters.disk_blobs import CACHE_LIMIT, CACHED_S, RecentBlobs
from services.kernel.blobs import BlobInfo


class Clock:
    def __init__(self) -> None:
        self.time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


def info(name: str, size_bytes: int) -> BlobInfo:
    return BlobInfo(scope="default", digest=name, size_bytes=size_bytes)


def test_the_oldest_go_when_there_is_no_room() -> None:
    recent = RecentBlobs(limit_bytes=10)
    for name in "abc":
        recent.add(info(name, 4), [b"data"])
    assert recent.get("default", "a") is None
    assert recent.get("default", "b") is not None
    assert recent.get("default", "c") is not None


def test_one_that_is_larger_than_all_the_room_is_not_kept() -> None:
    recent = RecentBlobs(limit_bytes=3)
    recent.add(info("a", 4), [b"data"])
    assert recent.get("default", "a") is None


def test_tiny_blobs_are_bounded_by_their_number() -> None:
    recent = RecentBlobs()
    for number in range(CACHE_LIMIT + 1):
        recent.add(info(str(number), 1), [b"x"])
    assert recent.get("default", "0") is None
    assert recent.get("default", "1") is not None


def test_after_a_while_the_disk_is_asked_again() -> None:
    clock = Clock()
    recent = RecentBlobs(now_s=clock)
    recent.add(info("a", 4), [b"data"])
    clock.time_s = CACHED_S - 1
    assert recent.get("default", "a") is not None
    clock.time_s = CACHED_S + 1
    assert recent.get("default", "a") is None


def test_any_part_is_read_across_pieces() -> None:
    recent = RecentBlobs()
    recent.add(info("a", 9), [b"abc", b"def", b"ghi"])
    found = recent.get("default", "a")
    assert found is not None
    for offset in range(10):
        for limit in range(11):
            wanted = b"abcdefghi"[offset:][: limit or None]
            assert b"".join(found.read(offset, limit)) == wanted, (offset, limit)


def test_what_was_cleared_takes_no_room_from_what_comes_after() -> None:
    recent = RecentBlobs(limit_bytes=10)
    recent.add(info("before", 8), [b"8 bytes."])
    recent.clear()
    assert recent.get("default", "before") is None
    recent.add(info("after", 8), [b"8 bytes."])
    assert recent.get("default", "after") is not None
