"""The report as one HTML page that needs nothing else: a treemap for each image, squarified as in Bruls et al. 2000."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .tables import Rows, megabytes, printable, sections

WIDTH, HEIGHT = 1200.0, 640.0
COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#e15759")
LABEL_WIDTH, LABEL_HEIGHT = 60, 14
# A folder is opened up to this level.
DEPTH = 4

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Where the bytes are</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 24px; color: #222; }}
.map {{ position: relative; width: {width}px; height: {height}px; background: #eee; }}
.map div {{ position: absolute; overflow: hidden; box-sizing: border-box; border: 1px solid #fff8;
  font-size: 10px; line-height: 12px; padding: 1px 3px; color: #fff; }}
table {{ border-collapse: collapse; margin: 12px 0 32px; }}
td, th {{ text-align: left; padding: 2px 12px 2px 0; }}
td:first-child {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style>
<h1>Where the bytes are</h1>
{body}
</html>
"""


@dataclass(frozen=True, slots=True)
class Box:
    x: float
    y: float
    width: float
    height: float


def as_html(report: dict[str, Any]) -> str:
    parts = [part for image in report["images"] for part in _map(image)]
    parts += [part for title, head, rows in sections(report) for part in _table(title, head, rows)]
    return PAGE.format(width=int(WIDTH), height=int(HEIGHT), body="\n".join(parts))


def _map(image: dict[str, Any]) -> Iterator[str]:
    yield f"<h2>{html.escape(image['name'])}</h2>"
    yield f"<p>{megabytes(image['compressed_bytes'])} compressed, {megabytes(image['rootfs_bytes'])} unpacked</p>"
    yield '<div class="map">'
    yield from _boxes(image["paths"], "", Box(0, 0, WIDTH, HEIGHT), 1, COLORS[0])
    yield "</div>"


def _table(title: str, head: Sequence[str], rows: Rows) -> Iterator[str]:
    yield f"<h3>{html.escape(title)}</h3>"
    yield "<table><tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)
    yield from ("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    yield "</table>"


def _boxes(paths: dict[str, int], parent: str, box: Box, level: int, color: str) -> Iterator[str]:
    children = [
        (path, size)
        for path, size in paths.items()
        if size and path.count("/") == level - 1 and (not parent or path.startswith(f"{parent}/"))
    ]
    whole = paths.get(parent, sum(size for _, size in children))
    placed = squarify([size for _, size in children], box, whole)
    for index, ((path, size), inner) in enumerate(zip(children, placed, strict=True)):
        shade = COLORS[index % len(COLORS)] if level == 1 else color
        yield _box(path, size, inner, shade)
        if level < DEPTH and min(inner.width, inner.height) > 2 * LABEL_HEIGHT:
            below = Box(inner.x + 2, inner.y + LABEL_HEIGHT, inner.width - 4, inner.height - LABEL_HEIGHT - 2)
            yield from _boxes(paths, path, below, level + 1, shade)


def _box(path: str, size: int, box: Box, color: str) -> str:
    shown = printable(path)
    name = shown.rpartition("/")[2] if box.width > LABEL_WIDTH and box.height > LABEL_HEIGHT else ""
    place = f"left:{box.x:.1f}px;top:{box.y:.1f}px;width:{box.width:.1f}px;height:{box.height:.1f}px"
    title = html.escape(f"{shown}: {megabytes(size)}", quote=True)
    return f'<div style="{place};background:{color}" title="{title}">{html.escape(name)}</div>'


def squarify(sizes: Sequence[int], box: Box, whole: int) -> list[Box]:
    """A box for each size, the largest first; what `whole` has beyond the sizes stays empty."""
    scale = box.width * box.height / whole if whole else 0
    areas = [size * scale for size in sizes]
    placed: list[Box] = []
    while areas:
        row = _row(areas, min(box.width, box.height))
        boxes, box = _place(row, box)
        placed += boxes
        areas = areas[len(row) :]
    return placed


def _row(areas: Sequence[float], side: float) -> Sequence[float]:
    """As many of the areas as make the row's worst aspect best."""
    best = 1
    while best < len(areas) and _worst(areas[: best + 1], side) <= _worst(areas[:best], side):
        best += 1
    return areas[:best]


def _worst(row: Sequence[float], side: float) -> float:
    total = sum(row)
    if not total or not side or not min(row):
        return float("inf")
    return max(side**2 * max(row) / total**2, total**2 / (side**2 * min(row)))


def _place(row: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    total = sum(row)
    placed = []
    if box.width >= box.height:
        depth = total / box.height if box.height else 0
        y = box.y
        for area in row:
            height = area / depth if depth else 0
            placed.append(Box(box.x, y, depth, height))
            y += height
        return placed, Box(box.x + depth, box.y, max(0.0, box.width - depth), box.height)
    depth = total / box.width if box.width else 0
    x = box.x
    for area in row:
        width = area / depth if depth else 0
        placed.append(Box(x, box.y, width, depth))
        x += width
    return placed, Box(box.x, box.y + depth, box.width, max(0.0, box.height - depth))
