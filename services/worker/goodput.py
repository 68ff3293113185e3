"""How fast bytes come in, measured from what is fetched anyway."""

# Smaller ones measure the way there and back, not the link.
MEASURED_BYTES_MIN = 64 * 1024
# How much the latest measurement counts.
WEIGHT = 0.3


class Goodput:
    """An exponentially weighted mean in bits per second; 0 until something was measured."""

    def __init__(self) -> None:
        self.bps = 0.0

    def note(self, size_bytes: int, duration_s: float) -> None:
        if size_bytes < MEASURED_BYTES_MIN or duration_s <= 0:
            return
        latest_bps = size_bytes * 8 / duration_s
        self.bps = latest_bps if not self.bps else (1 - WEIGHT) * self.bps + WEIGHT * latest_bps
