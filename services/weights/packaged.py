"""Models that come with the `fanlight` package, as the MANIFEST.json beside them lists them. None is ever fetched.

Their bytes, digests and licenses stand in that file only; the catalog says what they are called and are for.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from services.weights.manifest import Manifest
from services.weights.references import PackageRef, parse

PACKAGE = "fanlight"
MANIFEST = "MANIFEST.json"


def rows(place: str) -> list[dict[str, Any]]:
    """Catalog rows of the files in the folder `place` of the package, or of the one file that it names."""
    model, _, below = place.partition("/")
    listed = [row for row in _listed(model) if row["path"] == below or row["path"].startswith(f"{below}/")]
    cut = len(below.rpartition("/")[0]) if _is_file(listed, below) else len(below)
    return [
        {**row, "path": row["path"][cut:].lstrip("/"), "sources": [str(PackageRef(path=f"{model}/{row['path']}"))]}
        for row in listed
    ]


def license_of(listed: Iterable[Mapping[str, Any]]) -> str:
    """SPDX of all the rows together."""
    return " AND ".join(sorted({row["license"] for row in listed}))


def place_of(manifest: Manifest) -> Path | None:
    """Where the model lies: its folder, or its only file. None for a model that is not packaged."""
    first = manifest.files[0] if manifest.files else None
    source = parse(first.sources[0]) if first and first.sources else None
    if first is None or not isinstance(source, PackageRef):
        return None
    return path_of(source.path if len(manifest.files) == 1 else source.path.removesuffix(f"/{first.path}"))


def path_of(path: str) -> Path:
    """Where a path below the package is on this machine."""
    return Path(str(files(PACKAGE))) / path


@cache
def _listed(model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path_of(f"{model}/{MANIFEST}").read_text())["files"]
    return found


def _is_file(listed: list[dict[str, Any]], below: str) -> bool:
    return len(listed) == 1 and listed[0]["path"] == below
