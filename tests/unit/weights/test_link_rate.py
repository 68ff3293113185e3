"""What the link is said to give: the mean of stretches, the latest of which counts a fifth."""

import pytest

from services.weights.transfer.pacing import IDLE_S, LinkRate


def test_a_link_that_becomes_faster_changes_the_average_gradually() -> None:
    rate = LinkRate()
    rate.note(123, 0.0)
    rate.note(1_000_000, 1.0)
    assert rate.bps == 8e6
    rate.note(2_000_000, 2.0)
    assert rate.bps == pytest.approx(0.8 * 8e6 + 0.2 * 16e6)


def test_a_pause_is_not_taken_for_a_slow_link() -> None:
    rate = LinkRate()
    rate.note(0, 0.0)
    rate.note(1_000_000, 1.0)
    rate.note(500_000, 1.0 + IDLE_S + 0.1)
    rate.note(1_000_000, 2.0 + IDLE_S + 0.1)
    assert rate.bps == pytest.approx(8e6)
