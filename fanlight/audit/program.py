"""The audit's command line: `fanlight audit` and `python docker/size_audit.py`.

Exit code: 0 within budget, 1 a budget is broken, 2 an image cannot be read.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import budget, report
from .model import AuditError, Image
from .oci import Known
from .sources import FORMS, load
from .tables import as_markdown, as_table
from .treemap import as_html


def main(arguments: Sequence[str] | None = None, *, name: str | None = None) -> int:
    """`name`: of the command, for its help."""
    options = _options(arguments, name)
    try:
        found = audit(options)
    except AuditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    formats = {"table": as_table, "markdown": as_markdown, "html": as_html, "json": _as_json}
    _write(formats[options.format](found))
    for line in found["broken"]:
        print(f"over budget: {line}", file=sys.stderr)
    return 1 if found["broken"] else 0


def _write(text: str) -> None:
    """Whatever bytes an image's names are of."""
    try:
        sys.stdout.buffer.write(text.encode(errors="backslashreplace"))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _options(arguments: Sequence[str] | None, name: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=name, description="Where the bytes of container images are.", epilog=f"IMAGE: {FORMS}"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--format", choices=("table", "json", "markdown", "html"), default="table")
    parser.add_argument("--budget", type=Path, metavar="FILE", help="budgets in TOML; 35 GB compressed always holds")
    parser.add_argument("--plan", action="append", default=[], metavar="NAME=FILE", help="a weights plan, as JSON")
    parser.add_argument("--against", metavar="IMAGE", help="an earlier build to compare the first image with")
    parser.add_argument("--held", action="append", default=[], metavar="IMAGE", help="what a node holds already")
    parser.add_argument(
        "--link-mbps",
        type=_rates,
        default=[25.0, 100.0, 300.0],
        metavar="RATE,...",
        help="links that a pull is reckoned for, in Mbit/s",
    )
    parser.add_argument(
        "--unpack-mb-s",
        type=_rate,
        default=report.UNPACK_BYTES_S / 1e6,
        metavar="RATE",
        help="how fast a node unpacks layers, in MB/s (%(default)g)",
    )
    parser.add_argument("--platform", default="linux/amd64", help="of an image that has several (%(default)s)")
    return parser.parse_args(arguments)


def _rates(text: str) -> list[float]:
    return [_rate(part) for part in text.split(",")]


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not math.isfinite(rate) or rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0; several have commas between them")
    return rate


def audit(options: argparse.Namespace) -> dict[str, Any]:
    known: Known = {}
    images = [_load(name, options.platform, known) for name in options.images]
    held = [_load(name, options.platform, known) for name in options.held]
    found: dict[str, Any] = {"images": [report.describe(image) for image in images]}
    for image, described, shared in zip(images, found["images"], report.shared_with(images), strict=True):
        for layer, others in zip(described["layers"], shared, strict=True):
            layer["shared_with"] = others
        described["ready"] = report.ready(image, held, options.link_mbps, options.unpack_mb_s * 1e6)
    if options.against:
        before = _load(options.against, options.platform, known)
        found["images"][0]["against"] = {"name": options.against, **report.difference(images[0], before)}
    found["set"] = report.describe_set(images)
    found["broken"] = _broken(options, images, found["images"])
    return found


def _load(name: str, platform: str, known: Known) -> Image:
    try:
        return load(name, platform, known)
    except AuditError as error:
        raise AuditError(f"{name}: {error}") from error


def _broken(options: argparse.Namespace, images: Sequence[Image], described: Sequence[dict[str, Any]]) -> list[str]:
    limits = budget.read(options.budget) if options.budget else {}
    kinds = {each["name"]: each["finding_bytes"] for each in described}
    return budget.broken(limits, images, kinds) + budget.broken_plans(limits, dict(map(_plan, options.plan)))


def _plan(text: str) -> tuple[str, dict[str, Any]]:
    name, _, file = text.partition("=")
    try:
        plan = json.loads(Path(file).read_text())
        return name, {"fetch_bytes": int(plan["fetch_bytes"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AuditError(f"--plan {text}: no weights plan: {error}") from error


def _as_json(found: dict[str, Any]) -> str:
    # The tree is for the page; `paths` says the same in fewer lines.
    images = [{key: value for key, value in image.items() if key != "tree"} for image in found["images"]]
    return json.dumps({**found, "images": images}, indent=1) + "\n"
