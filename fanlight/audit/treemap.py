"""The report as one HTML page that needs nothing else: a treemap of each image's packages, and the tables.

The page itself, with its script, is treemap.html beside this file.
"""

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tables import Rows, megabytes, printable, sections

PAGE = Path(__file__).with_name("treemap.html")


def as_html(report: dict[str, Any]) -> str:
    maps = [part for image in report["images"] for part in _map(image)]
    tables = [part for title, head, rows in sections(report) for part in _table(title, head, rows)]
    # Dicts in the order of the page's marks.
    page = PAGE.read_text()
    for mark, text in {"<!--MAPS-->": "\n".join(maps), "<!--TABLES-->": "\n".join(tables)}.items():
        page = page.replace(mark, text, 1)
    return page


def _map(image: dict[str, Any]) -> Iterator[str]:
    totals = f"{megabytes(image['compressed_bytes'])} compressed, {megabytes(image['rootfs_bytes'])} unpacked"
    yield f"<h2>{html.escape(printable(image['name']))}</h2>"
    yield f"<p>{totals} <span class=path></span></p>"
    # A path may have any byte in it: nothing of it ends the script or becomes a tag.
    data = json.dumps(_shown(image["tree"]), separators=(",", ":")).replace("<", "\\u003c")
    yield f'<div class="map"></div><script type="application/json">{data}</script>'


def _shown(rows: Sequence[Any]) -> list[Any]:
    return [[printable(name), size, _shown(below)] for name, size, below in rows]


def _table(title: str, head: Sequence[str], rows: Rows) -> Iterator[str]:
    yield f"<h3>{html.escape(title)}</h3>"
    yield "<table><tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)
    yield from ("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    yield "</table>"
