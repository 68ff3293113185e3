"""fanlight/contract/annotators.json is what the registry of annotators says."""

import json
import subprocess
import sys
from pathlib import Path

from fanlight.contract.shipped import FILE, shipped_annotators, written

ROOT = Path(__file__).parents[2]


def test_the_catalog_of_annotators_is_fresh() -> None:
    made = subprocess.run(
        [sys.executable, "scripts/catalog.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert made.returncode == 0, made.stderr
    assert FILE.read_text(encoding="utf-8") == made.stdout, "run `make catalog`"


def test_what_is_read_is_what_was_written() -> None:
    assert written(list(shipped_annotators().values())) == FILE.read_text(encoding="utf-8")
    assert len(json.loads(FILE.read_text(encoding="utf-8"))) == len(shipped_annotators())


def test_reading_the_catalog_imports_no_annotator() -> None:
    code = "import sys; from fanlight.contract.shipped import shipped_annotators; shipped_annotators();"
    code += "print([m for m in ('numpy', 'cv2', 'PIL', 'torch', 'services.preprocessor') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == "[]", found.stderr
