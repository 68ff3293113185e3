"""How long jobs take, as an image for each rate: which share of them is done after so many seconds."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.fleet.run import Result

WIDTH_PX, HEIGHT_PX, LEFT_PX, TOP_PX, RIGHT_PX, BOTTOM_PX = 960, 540, 70, 50, 260, 60
FIRST_S, LAST_S = 2.0, 4_000.0
TICKS_S = (2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000)
# Of each curve.
POINTS = 200
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
COLORS = ("#444444", "#c02020", "#e08020", "#2060c0", "#60a0e0", "#208040", "#a060c0")


def draw(results: Sequence[Result], rates: Sequence[float], folder: Path) -> None:
    """`fleet-2.png` and so on: of each policy the median over seeds."""
    for rate in rates:
        image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), "white")
        _draw(ImageDraw.Draw(image), [each for each in results if each.rate_per_s == rate], rate)
        image.save(folder / f"fleet-{rate:.0f}.png", optimize=True)


def _draw(draw: ImageDraw.ImageDraw, results: Sequence[Result], rate: float) -> None:
    font = ImageFont.load_default(14)
    title = f"Jobs done within so many seconds, 100 nodes, {rate:.0f} jobs a second"
    draw.text((LEFT_PX, 16), title, "black", font)
    for at_s in TICKS_S:
        draw.line([_at(at_s, 0.0), _at(at_s, 1.0)], "#e4e4e4")
        draw.text((_at(at_s, 0.0)[0] - 10, HEIGHT_PX - BOTTOM_PX + 10), f"{at_s}", "black", font)
    for share in SHARES:
        draw.line([_at(FIRST_S, share), _at(LAST_S, share)], "#e4e4e4")
        if share not in (0.99, 0.95):
            draw.text((20, _at(FIRST_S, share)[1] - 8), f"{share:.0%}", "black", font)
    names = list(dict.fromkeys(result.policy for result in results))
    for place, name in enumerate(names):
        runs = [each.latencies_s for each in results if each.policy == name]
        color = COLORS[place % len(COLORS)]
        draw.line([_at(_median_s(runs, i / POINTS), i / POINTS) for i in range(1, POINTS + 1)], color, 2)
        top = TOP_PX + 24 * place
        draw.line([(WIDTH_PX - RIGHT_PX + 14, top + 8), (WIDTH_PX - RIGHT_PX + 40, top + 8)], color, 3)
        draw.text((WIDTH_PX - RIGHT_PX + 46, top), name, "black", font)


def _median_s(runs: Sequence[Sequence[float]], share: float) -> float:
    """Of the seconds after which that share of a run's jobs is done."""
    return statistics.median(run[min(len(run) - 1, int(share * len(run)))] for run in runs)


def _at(latency_s: float, share: float) -> tuple[float, float]:
    """Seconds on a logarithmic scale to the right, shares upwards."""
    x = math.log(min(max(latency_s, FIRST_S), LAST_S) / FIRST_S) / math.log(LAST_S / FIRST_S)
    height = HEIGHT_PX - TOP_PX - BOTTOM_PX
    return LEFT_PX + x * (WIDTH_PX - LEFT_PX - RIGHT_PX), TOP_PX + (1 - share) * height
