"""docs/renames.toml accounts for every public name that changed."""

import json
import tomllib
from pathlib import Path

from scripts.names import flattened, names, problems, removed_without_reason

ROOT = Path(__file__).parents[2]
RENAMES = ROOT / "docs" / "renames.toml"
BEFORE = ROOT / "tests" / "golden" / "names_before.json"


def test_every_renamed_name_is_listed_and_every_listed_one_was_renamed():
    renames = flattened(tomllib.loads(RENAMES.read_text()))
    before = {table: frozenset(old) for table, old in json.loads(BEFORE.read_text()).items()}

    found = problems(renames, before, names())

    assert not found, "docs/renames.toml (new names are guesses, removed ones need a comment):\n" + "\n".join(found)


def test_what_was_removed_says_why():
    assert removed_without_reason(RENAMES.read_text()) == []
