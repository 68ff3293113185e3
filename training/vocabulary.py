"""The names and colors a prompt may use, read from vocabulary.toml. Knows no pixels."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

STYLES = ("3d", "flat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing the model draws; `emoji` is the name of its image in the packs."""

    name: str
    emoji: str
    aliases: tuple[str, ...]


def _table() -> dict:
    return tomllib.loads((Path(__file__).parent / "vocabulary.toml").read_text())


def load_subjects() -> list[Subject]:
    """Every subject, in the order of the file."""
    return [
        Subject(name=name, emoji=row["emoji"], aliases=tuple(row["aliases"]))
        for name, row in _table()["subjects"].items()
    ]


def load_colors() -> dict[str, tuple[int, int, int]]:
    """Background colors by name, sRGB 0 to 255."""
    return {name: tuple(rgb) for name, rgb in _table()["colors"].items()}
