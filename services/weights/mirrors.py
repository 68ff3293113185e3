"""What mirrors say that they have: their catalogs, read once a process and kept for when nobody can be reached.

A mirror adds forms and places of files that are named by their sha256, and models of its own; it allows no pickle.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fanlight.errors import FanlightError
from services.kernel.logs import get_logger
from services.weights.catalog import MAX_CATALOG_BYTES, Catalog, catalog_of
from services.weights.publishing import CATALOG_FILE, HERE
from services.weights.selection import PICKLES
from services.weights.web import Web

log = get_logger()


async def mirrored(
    bases: Sequence[str],
    *,
    web: Web,
    address: Callable[[str], Awaitable[str]],
    cache: Path,
    is_offline: bool,
) -> Catalog:
    """All mirrors' catalogs together. One that cannot be reached, or is no catalog, costs a warning and its forms."""
    found = Catalog()
    for base in reversed(bases):
        try:
            text = await _text(base, web, address, cache, is_offline=is_offline)
            found = found.under(catalog_of(_local(json.loads(text), base)))
        except (FanlightError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("weights_mirror_unread", mirror=base.split("?")[0], why=str(error))
    return found


async def _text(
    base: str, web: Web, address: Callable[[str], Awaitable[str]], cache: Path, *, is_offline: bool
) -> bytes:
    kept = cache / f"mirror-{hashlib.sha256(base.encode()).hexdigest()[:16]}.json"
    if is_offline:
        return kept.read_bytes()
    try:
        body, _ = await web.body(await address(f"{base}/{CATALOG_FILE}"), limit_bytes=MAX_CATALOG_BYTES)
    except FanlightError:
        if not kept.exists():
            raise
        return kept.read_bytes()
    fresh = kept.with_suffix(".part")
    fresh.write_bytes(body)
    fresh.rename(kept)
    return body


def _local(document: dict[str, Any], base: str) -> dict[str, Any]:
    """The mirror's catalog with its relative sources made whole, and without pickles."""
    entries = [row for row in document.get("entries", ()) if not _has_pickle(row)]
    for row in entries:
        for file in row["files"]:
            file["sources"] = [_whole(source, base) for source in file.get("sources", ())]
    packed = document.get("packed", {})
    for row in packed.values():
        row["sources"] = [_whole(source, base) for source in row["sources"]]
    return {"entries": entries, "packed": packed, "tensor_tables": document.get("tensor_tables", {})}


def _has_pickle(entry: dict[str, Any]) -> bool:
    return any(file["path"].endswith(PICKLES) for file in entry["files"])


def _whole(source: str, base: str) -> str:
    return f"{base}/{source.removeprefix(HERE)}" if source.startswith(HERE) else source
