import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.weights.transfer.pacing import LinkRate, Meter, SharedTokenBucket, TokenBucket


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 2)), min_size=1, max_size=60))
def test_a_bucket_never_lets_more_through_than_its_rate_and_one_burst(takes):
    rate, now_s, taken = 1000.0, 0.0, 0
    bucket = TokenBucket(rate=rate)
    for count, pause_s in takes:
        now_s += bucket.take(count, now_s)
        taken += count
        assert taken <= rate * (now_s + 0.25) + 1e-6
        now_s += pause_s


def test_a_meter_reports_the_rate_of_its_window():
    meter = Meter(window_s=10.0)
    for second in range(21):
        meter.count(1000, float(second))
    assert meter.bytes_per_s(20.0) == 1000.0
    assert meter.is_slower(9000, 20.0)
    assert not meter.is_slower(7000, 20.0)


def test_a_meter_says_nothing_before_its_window_is_full():
    meter = Meter(window_s=10.0)
    meter.count(1, 0.0)
    assert not meter.is_slower(1e9, 5.0)


def test_the_link_is_measured_over_all_downloads_together():
    link = LinkRate()
    for tenth in range(31):
        link.note(62_500, tenth / 10)
        link.note(62_500, tenth / 10)
    assert link.bps == pytest.approx(10_000_000, rel=0.1)


def test_a_pause_between_two_downloads_says_nothing_of_the_link():
    link = LinkRate()
    for tenth in range(21):
        link.note(125_000, tenth / 10)
    before = link.bps
    link.note(125_000, 500.0)
    assert link.bps == before > 0


def test_little_that_came_at_once_measures_no_link():
    link = LinkRate()
    link.note(1_000_000, 0.0)
    assert link.bps == 0


def test_two_processes_that_share_a_bucket_get_its_rate_together(tmp_path):
    ours, theirs = (SharedTokenBucket(rate=1000.0, path=tmp_path / "bucket") for _ in range(2))
    waits_s = [bucket.take(500, 0.0) for _ in range(4) for bucket in (ours, theirs)]
    assert waits_s == pytest.approx([0.5 * taken for taken in range(1, 9)])


def test_a_bucket_from_before_the_machine_was_restarted_delays_no_download(tmp_path):
    (tmp_path / "bucket").write_bytes(struct.pack("<dd", -1e9, 1e6))
    assert SharedTokenBucket(rate=1000.0, path=tmp_path / "bucket").take(100, 5.0) == pytest.approx(0.1)


def test_a_torn_bucket_starts_again(tmp_path):
    (tmp_path / "bucket").write_bytes(b"torn")
    assert SharedTokenBucket(rate=1000.0, path=tmp_path / "bucket").take(100, 5.0) == pytest.approx(0.1)
