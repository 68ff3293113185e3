"""The parts that several rooms share: back-off, moving averages, the cache bounded by bytes."""

import pytest

from fanlight.backoff import backoff_s
from services.kernel.averages import MovingAverage
from services.kernel.blobs import ByteLru


def test_a_pause_doubles_up_to_the_longest_and_chance_halves_it_at_most() -> None:
    assert [backoff_s(n, longest_s=5.0, chance=1.0) for n in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff_s(0, longest_s=5.0, chance=0.0) == 0.1
    assert backoff_s(10**9, longest_s=5.0, chance=0.0) == 2.5


def test_the_latest_value_counts_by_its_weight_and_the_first_whole() -> None:
    average = MovingAverage(weight=0.25)
    average.note(4.0)
    assert (average.mean, average.deviation) == (4.0, 0.0)
    average.note(8.0)
    assert (average.mean, average.variance) == (5.0, 0.75 * 0.25 * 16)


def test_an_average_that_warms_up_counts_its_first_values_alike() -> None:
    average = MovingAverage(weight=0.1, warms_up=True)
    for value in (1.0, 2.0, 6.0):
        average.note(value)
    assert average.mean == pytest.approx(3.0)


def cache(**limits: int) -> ByteLru[str, bytes]:
    return ByteLru(limit_bytes=10, size_of=len, **limits)


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    kept = cache()
    kept.put("a", b"1234")
    kept.put("b", b"1234")
    assert kept.get("a") == b"1234"
    kept.put("c", b"1234")
    assert (list(kept), kept.size_bytes) == (["a", "c"], 8)


def test_looking_without_touching_is_no_use() -> None:
    kept = cache()
    kept.put("a", b"1234")
    kept.put("b", b"1234")
    kept.get("a", touch=False)
    kept.put("c", b"1234")
    assert list(kept) == ["b", "c"]


def test_what_is_larger_than_the_cache_is_not_kept_and_takes_no_place() -> None:
    kept = cache()
    kept.put("a", b"12345678901")
    assert (len(kept), kept.size_bytes, "a" in kept) == (0, 0, False)


def test_putting_again_replaces_the_bytes_too() -> None:
    kept = cache()
    kept.put("a", b"12345678")
    kept.put("a", b"1")
    assert kept.size_bytes == 1
    kept.drop("a")
    kept.drop("a")
    assert (len(kept), kept.size_bytes) == (0, 0)


def test_entries_have_a_limit_of_their_own() -> None:
    kept = cache(count_limit=2)
    for key in "abc":
        kept.put(key, b"1")
    assert list(kept) == ["b", "c"]
    kept.clear()
    assert (len(kept), kept.size_bytes) == (0, 0)
