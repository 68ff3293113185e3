"""What `fanlight weights` shows of plans and downloads: to people, and as rows for programs."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table

from services.weights.plan import LINK_RATES_MBPS, Plan, report
from services.weights.targets import Progress

REPORT_EVERY_S = 0.5
PIPED_CHARS = 250


def console() -> Console:
    """As wide as its lines where nobody looks at it on a screen."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_CHARS)


def show_plans(plans: Sequence[Plan]) -> None:
    data = report(plans)
    out = console()
    table = Table("of", Column("file", overflow="fold"), "bytes", "over the link", "why", box=None)
    for plan in plans:
        for item in plan.files:
            row = (f"{item.size_bytes:,}", f"{item.fetch_bytes:,}", escape(item.why))
            table.add_row(escape(plan.manifest.reference), escape(item.link), *row)
    for plan in plans:
        for skip in plan.skipped:
            row = (f"{skip.size_bytes:,}", "-", escape(skip.why))
            table.add_row(escape(plan.manifest.reference), escape(skip.path), *row, style="dim")
    out.print(table)
    out.print(
        f"fetch {data['fetch_bytes']:,} bytes, held {data['held_bytes']:,}, left out {data['skipped_bytes']:,}"
        + (f", packed away {data['packed_away_bytes']:,}" if data["packed_away_bytes"] else "")
    )
    seconds = ", ".join(f"{data['seconds'][str(rate)]:,} s at {rate} Mbit/s" for rate in LINK_RATES_MBPS)
    out.print(seconds)
    for caveat in data["caveats"]:
        out.print(f"[yellow]note:[/yellow] {escape(caveat)}")


def json_reporter(say: Callable[[dict[str, Any]], None]) -> Callable[[Progress], None]:
    last_s = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s < REPORT_EVERY_S:
            return
        last_s = now_s
        say(_progress_row(progress))

    return tell


def _progress_row(progress: Progress) -> dict[str, Any]:
    return {
        "event": "progress",
        "reference": progress.reference,
        "file": progress.path,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "bytes_per_s": round(progress.bytes_per_s),
        "seconds_left": progress.seconds_left and round(progress.seconds_left, 1),
        "source": progress.source,
    }


def bars() -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[source]}"),
        console=Console(stderr=True),
    )


def bar_reporter(shown: Bars) -> Callable[[Progress], None]:
    tasks: dict[tuple[str, str], TaskID] = {}

    def tell(progress: Progress) -> None:
        key = (progress.reference, progress.path)
        if key not in tasks:
            tasks[key] = shown.add_task(progress.path, total=progress.total_bytes, source=progress.source)
        shown.update(tasks[key], completed=progress.done_bytes, source=progress.source)

    return tell
