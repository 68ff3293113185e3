"""Budgets in TOML, and which of them an image, the set, or a weights plan breaks."""

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .model import AuditError, Image
from .report import ready, set_bytes

# What the platform takes at most.
CAP_BYTES = 35_000_000_000
# Table to the keys of what is in it. A key that nobody reads would be a budget that nobody keeps.
_IMAGE_KEYS = {"match", "compressed_bytes", "unpacked_bytes", "layer_compressed_bytes", "above", "kinds"}
_KEYS = {"images": _IMAGE_KEYS, "more": {"match", "held", "compressed_bytes"}, "weights": {"fetch_bytes"}}
_SET_KEYS = {"compressed_bytes"}


def read(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AuditError(f"{path}: {error}") from error
    _check(path, found, {*_KEYS, "set"}, "")
    _check(path, found.get("set", {}), _SET_KEYS, "set.")
    for table, keys in _KEYS.items():
        named = found.get(table, {})
        _check(path, named, set(named) if isinstance(named, dict) else set(), f"{table}.")
        for name, limits in named.items():
            _check(path, limits, keys, f"{table}.{name}.")
            if table == "more" and set(limits) != keys:
                raise AuditError(f"{path}: more.{name} needs {', '.join(sorted(keys))}")
    return found


def _check(path: Path, table: Any, keys: set[str], where: str) -> None:
    if not isinstance(table, dict):
        raise AuditError(f"{path}: {where.rstrip('.')} is no table")
    if unknown := set(table) - keys:
        raise AuditError(f"{path}: {where}{min(unknown)} is no budget; there are {', '.join(sorted(keys))}")
    numbers = {key: value for key, value in table.items() if key == "above" or key.endswith("_bytes")}
    numbers |= {f"kinds.{key}": value for key, value in dict(table.get("kinds", {})).items()}
    for key, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise AuditError(f"{path}: {where}{key} is {value!r}, which is no number of bytes")


def broken(
    budget: Mapping[str, Any], images: Sequence[Image], finding_bytes: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """One line for each budget that is broken. `finding_bytes`: image name to bytes by kind of finding."""
    lines = [
        f"{image.name}: {image.compressed_bytes:,} bytes compressed; the platform takes {CAP_BYTES:,}"
        for image in images
        if image.compressed_bytes > CAP_BYTES
    ]
    for name, limits in budget.get("images", {}).items():
        for image in images:
            if fnmatch.fnmatch(image.name, limits.get("match", f"*{name}*")):
                lines += _of_image(image, limits, finding_bytes.get(image.name, {}))
    for name, limits in budget.get("more", {}).items():
        lines += _of_second(name, images, limits)
    limit = budget.get("set", {}).get("compressed_bytes")
    if limit is not None and set_bytes(images) > limit:
        lines.append(f"the set: {set_bytes(images):,} bytes compressed; the budget is {limit:,}")
    return lines


def _of_image(image: Image, limits: Mapping[str, Any], kinds: Mapping[str, int]) -> list[str]:
    skipped = limits.get("above", 0)
    sizes = {
        "compressed_bytes": sum(layer.compressed_bytes for layer in image.layers[skipped:]),
        "unpacked_bytes": sum(layer.unpacked_bytes for layer in image.layers[skipped:]),
        "layer_compressed_bytes": max((layer.compressed_bytes for layer in image.layers[skipped:]), default=0),
    }
    lines = [
        f"{image.name}: {key} is {size:,}; the budget is {limits[key]:,}"
        for key, size in sizes.items()
        if key in limits and size > limits[key]
    ]
    for kind, limit in limits.get("kinds", {}).items():
        if kinds.get(kind, 0) > limit:
            lines.append(f"{image.name}: {kind} is {kinds[kind]:,} bytes; the budget is {limit:,}")
    return lines


def _of_second(name: str, images: Sequence[Image], limits: Mapping[str, Any]) -> list[str]:
    """What an image adds on a node that holds others; nothing is said where one of them is not audited."""
    held = [image for pattern in limits["held"] for image in images if fnmatch.fnmatch(image.name, pattern)]
    wanted = [image for image in images if fnmatch.fnmatch(image.name, limits["match"])]
    if len(held) < len(limits["held"]):
        return []
    sizes = {image.name: ready(image, held, ())["fetch_bytes"] for image in wanted}
    limit = limits["compressed_bytes"]
    return [
        f"{image}: {name} is {size:,} bytes more; the budget is {limit:,}"
        for image, size in sizes.items()
        if size > limit
    ]


def broken_plans(budget: Mapping[str, Any], plans: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`plans`: name to what `fanlight weights plan --json` printed."""
    limits = budget.get("weights", {})
    return [
        f"weights {name}: {plan['fetch_bytes']:,} bytes to fetch; the budget is {limits[name]['fetch_bytes']:,}"
        for name, plan in plans.items()
        if name in limits and plan["fetch_bytes"] > limits[name]["fetch_bytes"]
    ]
