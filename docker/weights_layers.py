"""Puts weights on top of an image, a layer for each file of their plan, so that a changed file costs only itself.

Knows podman and the command line `fanlight weights`; which files there are, and from where, is the plan's affair.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STORES = ROOT / "dist" / "weights"
# Where things are in our images, and whose.
STORE_INSIDE = "/weights"
PACKAGE_INSIDE = "/opt/fanlight/lib/fanlight"
OWNER = "65532:65532"
PACKAGED = "package:"


def bake(base: str, name: str, references: Sequence[str], *, pipeline: str = "") -> None:
    """Builds `name` from `base`. What the plan does not name is not in it."""
    planned = plan(references, pipeline)
    if local := [str(row["source"]) for row in planned["files"] if Path(str(row["source"])).is_absolute()]:
        # Nothing would be baked: a store keeps what has a name that others can ask for.
        raise SystemExit(f"error: {local[0]} is a file of this machine; bake what a mirror, a hub or the catalog names")
    with tempfile.TemporaryDirectory(dir=ROOT / "dist") as folder:
        context = Path(folder)
        lines = [f"FROM {base}", *packaged_layers(planned, context)]
        if any(not _packaged_path(row) for row in planned["files"]):
            store = fetch(references, pipeline)
            lines += store_layers(store, context)
        containerfile = context / "Containerfile"
        containerfile.write_text("\n".join(lines) + "\n")
        build = ["podman", "build", "--quiet", "--layers", "--timestamp", "0", "--network", "none"]
        subprocess.run([*build, "--file", containerfile, "--tag", name, context], check=True)


def plan(references: Sequence[str], pipeline: str) -> dict[str, Any]:
    command = _fanlight("plan", references, pipeline)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fetch(references: Sequence[str], pipeline: str) -> Path:
    """A store that holds these references and nothing else; what an earlier try left is gone on with."""
    subprocess.run(_fanlight("fetch", references, pipeline), check=True)
    return _store_of(references, pipeline)


def _fanlight(command: str, references: Sequence[str], pipeline: str) -> list[str]:
    options = ["--dir", str(_store_of(references, pipeline)), *(["--pipeline", pipeline] if pipeline else [])]
    return [sys.executable, "-m", "fanlight.cli.main", "weights", command, *references, *options]


def _store_of(references: Sequence[str], pipeline: str) -> Path:
    return STORES / hashlib.sha256(" ".join([pipeline, *references]).encode()).hexdigest()[:12]


def packaged_layers(planned: dict[str, Any], context: Path) -> Iterator[str]:
    """The models that come with our own package, which the image has left out."""
    for number, row in enumerate(planned["files"]):
        if place := _packaged_path(row):
            shutil.copyfile(ROOT / "fanlight" / place, context / f"packaged-{number}")
            yield f"COPY packaged-{number} {PACKAGE_INSIDE}/{place}"


def _packaged_path(row: dict[str, Any]) -> str:
    source = str(row["source"])
    return source.removeprefix(PACKAGED) if source.startswith(PACKAGED) else ""


def store_layers(store: Path, context: Path) -> Iterator[str]:
    """Each object of the store, the largest first; then what names them: the views that link to them, and the index."""
    for path in sorted(store.glob("objects/*/*"), key=lambda path: (-path.stat().st_size, path.name)):
        os.link(path, context / path.name)
        yield f"COPY --chown={OWNER} {path.name} {STORE_INSIDE}/{path.relative_to(store)}"
    shutil.copytree(store / "models", context / "names" / "models", symlinks=True)
    shutil.copyfile(store / "index.sqlite", context / "names" / "index.sqlite")
    yield f"COPY --chown={OWNER} names {STORE_INSIDE}"
