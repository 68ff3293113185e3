"""docs/benchmarks.md says what docs/benchmarks.json says, and the figures say themselves whether a goal was met."""

import json

import pytest

from benchmarks import tables
from benchmarks.commands import COMMANDS
from benchmarks.figures import Figure, Report

# What no machine has been there for yet.
NEVER_MEASURED = {"diffusion gpu", "annotators gpu"}


@pytest.fixture(scope="module")
def entries() -> dict[str, dict]:
    return json.loads(tables.FIGURES.read_text())


def test_the_pages_tables_are_what_the_figures_give(entries: dict[str, dict]) -> None:
    text = tables.PAGE.read_text()
    assert tables.page(text, entries) == text, "run `python -m benchmarks.tables`"


def test_every_measurement_has_its_table_and_every_command_its_measurement(entries: dict[str, dict]) -> None:
    assert sorted(tables.names(tables.PAGE.read_text())) == sorted(entries)
    assert {each.name for each in COMMANDS} - NEVER_MEASURED <= entries.keys()


def test_what_the_file_says_of_goals_is_what_the_numbers_say(entries: dict[str, dict]) -> None:
    rows = [row for entry in entries.values() for row in entry["figures"]]
    assert [Figure.from_json(row).to_json() for row in rows] == rows


def test_every_measurement_says_when_it_was_made_and_on_what(entries: dict[str, dict]) -> None:
    new = [entry["measured"] for entry in entries.values() if "commit" in entry["measured"]]
    assert new
    for around in new:
        assert {"date", "load", "cpu", "cores", "loop_s", "commit", "versions"} <= around.keys()
        assert {"python", "torch", "diffusers", "numpy", "fanlight"} <= around["versions"].keys()
    assert all(entry["measured"]["date"] >= "2026-11-21" for entry in entries.values())


def test_a_changed_figure_changes_the_page() -> None:
    text = "a\n<!-- figures x -->\nold\n<!-- end -->\nz\n"
    figure = Figure(what="ours", value=0.3, unit="ratio", against="theirs", goal=0.25)
    entry = {"command": "python -m x", "measured": {"date": "2026-12-01"}, "figures": [figure.to_json()]}
    made = tables.page(text, {"x": entry})
    assert "| ours | theirs | 0.3 | at most 0.25: missed |\n" in made
    assert made.startswith("a\n<!-- figures x -->\n")
    assert made.endswith("\n<!-- end -->\nz\n")
    assert tables.page(made, {"x": entry}) == made


def test_several_columns_make_one_row() -> None:
    report = Report()
    report.add("place", [50.0, 60.0, 70.0], "us", column="p50")
    report.add("place", 140.0, "us", column="p99", goal=200.0)
    entry = {"command": "c", "measured": {"date": "d"}, "figures": [each.to_json() for each in report.figures]}
    assert "| place | 60 us (50 to 70) | 140 us; at most 200: met |" in tables.table(entry)


def test_a_goal_of_nothing_is_a_goal() -> None:
    assert Figure(what="lost", value=0.0, goal=0.0).to_json()["met"]
    assert Figure.from_json(Figure(what="lost", value=0.0, goal=0.0).to_json()) == Figure(what="lost", value=0, goal=0)
    assert Figure(what="lost", value=1.0, goal=0.0).met is False
    assert Figure(what="rate", value=0.4, goal=0.5, at_least=True).met is False
