"""What several rooms share: back-off, moving averages, the cache bounded by bytes."""

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
    cached = cache()
    cached.put("a", b"1234")
    cached.put("b", b"1234")
    assert cached.get("a") == b"1234"
    cached.put("c", b"1234")
    assert (list(cached), cached.size_bytes) == (["a", "c"], 8)


def test_a_get_without_touch_does_not_count_as_a_use() -> None:
    cached = cache()
    cached.put("a", b"1234")
    cached.put("b", b"1234")
    cached.get("a", touch=False)
    cached.put("c", b"1234")
    assert list(cached) == ["b", "c"]


def test_a_value_larger_than_the_cache_is_not_cached() -> None:
    cached = cache()
    cached.put("a", b"12345678901")
    assert (len(cached), cached.size_bytes, "a" in cached) == (0, 0, False)


def test_putting_again_replaces_the_bytes_too() -> None:
    cached = cache()
    cached.put("a", b"12345678")
    cached.put("a", b"1")
    assert cached.size_bytes == 1
    cached.drop("a")
    cached.drop("a")
    assert (len(cached), cached.size_bytes) == (0, 0)


def test_the_number_of_entries_has_its_own_limit() -> None:
    cached = cache(count_limit=2)
    for key in "abc":
        cached.put(key, b"1")
    assert list(cached) == ["b", "c"]
    cached.clear()
    assert (len(cached), cached.size_bytes) == (0, 0)
