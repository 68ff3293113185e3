"""What benchmarks measure, in one form: for the screen, for docs/benchmarks.json and for the tables made from it.

Every command of `benchmarks/` takes `--smoke`, which runs the same code in seconds with tiny numbers, and
`--json FILE`, which writes its figures. Knows no benchmark.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RATIO = "ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One value with its unit. `low` and `high`: of the rounds; `column`: where a table has several for each row."""

    what: str
    value: float
    unit: str = ""
    against: str = ""
    column: str = ""
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def shown(self) -> str:
        value = f"{number(self.value)}{unit_of(self.unit)}"
        if self.low is None or self.high is None or self.low == self.high:
            return value
        return f"{value} ({number(self.low)} to {number(self.high)})"

    def goal_shown(self) -> str:
        """Such as `at most 0.25: missed`."""
        if self.goal is None:
            return ""
        return f"at {'least' if self.at_least else 'most'} {number(self.goal)}: {'met' if self.met else 'missed'}"

    def line(self) -> str:
        parts = [self.what, self.column, f"against {self.against}" if self.against else ""]
        goal = f" ({self.goal_shown()})" if self.goal is not None else ""
        return f"{', '.join(part for part in parts if part)}: {self.shown()}{goal}"

    def to_json(self) -> dict[str, Any]:
        """Without what says nothing; with `met`, so that a reader of the file need not know the rule."""
        values = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        values = {name: value for name, value in values.items() if value != ""}
        return values | ({} if self.met is None else {"met": self.met})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Figure":
        return cls(**{name: value for name, value in values.items() if name != "met"})


def number(value: float) -> str:
    """Three digits that count, and all of a whole number."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.1g}"


def unit_of(unit: str) -> str:
    return "" if unit in (RATIO, "") else f" {unit}"


class Report:
    """The figures of one run; each is printed as it is added."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def add(
        self,
        what: str,
        values: float | Sequence[float],
        unit: str,
        *,
        against: str = "",
        column: str = "",
        goal: float | None = None,
        at_least: bool = False,
    ) -> None:
        """`values`: of the rounds; their median counts, and the least and the most are kept beside it."""
        found = [float(values)] if isinstance(values, int | float) else [float(each) for each in values]
        several = len(found) > 1
        figure = Figure(
            what=what,
            value=_rounded(statistics.median(found)),
            unit=unit,
            against=against,
            column=column,
            low=_rounded(min(found)) if several else None,
            high=_rounded(max(found)) if several else None,
            goal=goal,
            at_least=at_least,
        )
        self.figures.append(figure)
        print(figure.line(), flush=True)

    def ratio(
        self,
        what: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        *,
        against: str,
        goal: float | None = None,
        at_least: bool = False,
    ) -> None:
        """Ours over theirs, round by round, as rounds take turns on a machine that has others to serve."""
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        self.add(what, ratios, RATIO, against=against, goal=goal, at_least=at_least)

    def save(self, path: Path | None) -> None:
        if path is not None:
            path.write_text(json.dumps([figure.to_json() for figure in self.figures], indent=1))


def _rounded(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all commands."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--smoke", action="store_true", help="the same with tiny numbers, in seconds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def in_turns(rounds: int, *works: Callable[[], float]) -> list[list[float]]:
    """What each work measures of itself, round by round, one after the other; a list for each work."""
    taken = [[work() for work in works] for _ in range(rounds)]
    return [list(column) for column in zip(*taken, strict=True)]


def load(path: Path) -> list[Figure]:
    return from_json(json.loads(path.read_text()))


def from_json(rows: Iterable[dict[str, Any]]) -> list[Figure]:
    return [Figure.from_json(row) for row in rows]
