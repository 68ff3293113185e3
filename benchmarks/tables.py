"""Writes the tables of docs/benchmarks.md from docs/benchmarks.json, between their markers. Measures nothing.

A table stands between `<!-- figures NAME -->` and `<!-- end -->`, NAME as in the JSON. `--check` changes nothing and
says with its exit code whether the tables are what the JSON gives. Run: `python -m benchmarks.tables [--check]`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, from_json

DOCS = Path(__file__).parent.parent / "docs"
FIGURES, PAGE = DOCS / "benchmarks.json", DOCS / "benchmarks.md"
_MARKED = re.compile(r"(?P<begin><!-- figures (?P<name>[^>]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def page(text: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with every table as the figures give it. KeyError for a table without figures."""
    return _MARKED.sub(lambda found: found["begin"] + table(entries[found["name"]]) + found["end"], text)


def names(text: str) -> list[str]:
    """The tables that a page has."""
    return [found["name"] for found in _MARKED.finditer(text)]


def table(entry: Mapping[str, Any]) -> str:
    figures = from_json(entry["figures"])
    rows = _wide(figures) if any(figure.column for figure in figures) else _long(figures)
    lines = [f"`{entry['command']}`{_when(entry)}", ""]
    header, *body = _without_empty_columns(list(rows))
    lines += [_row(header), _row(["---"] * len(header)), *map(_row, body), ""]
    return "\n".join(lines)


def _when(entry: Mapping[str, Any]) -> str:
    """The date, and of figures that were measured by `make benchmarks` what they depend on."""
    around = entry["measured"]
    if "commit" not in around:
        return f"; measured {around['date']}, not since"
    versions = around["versions"]
    return (
        f"; measured {around['date']} at {around['commit']}, load {around['load']}, {around['cores']} cores of"
        f" {around['cpu']}, reference loop {around['loop_s'] * 1e3:.0f} ms, Python {versions['python']},"
        f" torch {versions['torch']}, diffusers {versions['diffusers']}"
    )


def _long(figures: Sequence[Figure]) -> Iterator[list[str]]:
    yield ["what", "against", "figure", "goal"]
    for figure in figures:
        yield [figure.what, figure.against, figure.shown(), figure.goal_shown()]


def _wide(figures: Sequence[Figure]) -> Iterator[list[str]]:
    """A row for each `what` and `against`, a column for each `column`."""
    columns = list(dict.fromkeys(figure.column for figure in figures))
    yield ["what", "against", *columns]
    for what, against in dict.fromkeys((figure.what, figure.against) for figure in figures):
        cells = {each.column: each for each in figures if (each.what, each.against) == (what, against)}
        yield [what, against, *(_cell(cells[column]) if column in cells else "" for column in columns)]


def _cell(figure: Figure) -> str:
    return f"{figure.shown()}; {figure.goal_shown()}" if figure.goal is not None else figure.shown()


def _without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in used] for row in rows]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write() -> None:
    PAGE.write_text(page(PAGE.read_text(), json.loads(FIGURES.read_text())))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args(argv).check:
        write()
        return 0
    text = PAGE.read_text()
    if page(text, json.loads(FIGURES.read_text())) == text:
        return 0
    print(
        "docs/benchmarks.md is not what docs/benchmarks.json gives: run `python -m benchmarks.tables`", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
