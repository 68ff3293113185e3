"""docs/settings.md is what the settings classes say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_settings_page_is_fresh():
    made = subprocess.run(
        [sys.executable, "scripts/settings.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert made.returncode == 0, made.stderr
    assert (ROOT / "docs" / "settings.md").read_text() == made.stdout, "run `make settings`"
