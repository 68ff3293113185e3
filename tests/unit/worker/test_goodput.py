"""How fast the link is, and how far measurements stray from that."""

import math
from collections.abc import Sequence

import pytest

from services.worker.blobs import MEASURED_BYTES_MIN, Goodput

# How much the latest measurement counts.
WEIGHT = 0.3
SIZE_BYTES = 10 * MEASURED_BYTES_MIN


def measured(*rates_bps: float) -> Goodput:
    goodput = Goodput()
    for rate_bps in rates_bps:
        goodput.note(SIZE_BYTES, SIZE_BYTES * 8 / rate_bps)
    return goodput


def weighted(rates_bps: Sequence[float]) -> tuple[float, float]:
    """By the definition: each measurement counts less the older it is, and the first has all that is left."""
    count = len(rates_bps)
    weights = [(1 - WEIGHT) ** (count - 1), *(WEIGHT * (1 - WEIGHT) ** (count - 1 - i) for i in range(1, count))]
    mean = sum(weight * rate for weight, rate in zip(weights, rates_bps, strict=True))
    return mean, math.sqrt(sum(weight * (rate - mean) ** 2 for weight, rate in zip(weights, rates_bps, strict=True)))


def test_before_and_after_the_first_measurement_nothing_strays() -> None:
    assert (Goodput().bps, Goodput().deviation_bps) == (0.0, 0.0)
    assert (measured(8e6).bps, measured(8e6).deviation_bps) == (pytest.approx(8e6), 0.0)


@pytest.mark.parametrize("rates_bps", [(1e6, 2e6), (2e6, 1e6), (1e6, 1e6, 9e6), (4e6, 1e6, 8e6, 2e6, 2e6)])
def test_mean_and_deviation_are_those_of_the_latest_measurements(rates_bps: tuple[float, ...]) -> None:
    goodput = measured(*rates_bps)
    assert (goodput.bps, goodput.deviation_bps) == pytest.approx(weighted(rates_bps))


def test_what_took_no_time_is_not_measured() -> None:
    goodput = measured(8e6)
    goodput.note(SIZE_BYTES, 0.0)
    assert (goodput.bps, goodput.deviation_bps) == (pytest.approx(8e6), 0.0)
