"""`fanlight weights`: plan, fetch, publish and manage models. Prints; decides nothing."""

import asyncio
import contextlib
import json
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table

from fanlight.errors import FanlightError
from fanlight.terminal import printable
from services.kernel import logs
from services.kernel.config import CommonSettings, SettingsError, load, refuse_unknown
from services.weights.mirror.mirrors import Published, destination
from services.weights.mirror.mirrors import publish as publish_models
from services.weights.planning.plan import LINK_RATES_MBPS, FetchPlan, plan_to_json
from services.weights.settings import WeightsSettings
from services.weights.store.store import Fetched, WeightStore
from services.weights.transfer.download import DownloadProgress

REPORT_EVERY_S = 0.5
PIPED_CHARS = 250

app = typer.Typer(name="weights", help="Plan, fetch and keep model weights.", no_args_is_help=True)

T = TypeVar("T")
References = Annotated[list[str], typer.Argument(help="hf:ORG/REPO, urn:air:..., https:..., a path or a catalog name.")]
Dir = Annotated[Path | None, typer.Option("--dir", help="Folder of the store. Default: FANLIGHT_WEIGHTS_DIR.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Pipeline = Annotated[str, typer.Option(help="Only the files that this pipeline needs, such as text2img.")]
Checker = Annotated[bool, typer.Option("--safety-checker", help="Include the safety checker.")]
Precision = Annotated[str, typer.Option(help="fp16 or fp32.")]
Sha256 = Annotated[str, typer.Option(help="Required sha256 of the single file.")]
Names = Annotated[list[str], typer.Argument(help="AUTHOR/NAME as listed by `ls`, or a sha256, AutoV2 or AutoV3.")]


def escape(text: str) -> str:
    """Of hubs and files, for rich: it marks up nothing, and controls no terminal."""
    return escape_markup(printable(text))


def console() -> Console:
    """A console; wide enough for every line if the output is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_CHARS)


def show_plans(plans: Sequence[FetchPlan]) -> None:
    data = plan_to_json(plans)
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


def json_reporter(say: Callable[[dict[str, Any]], None]) -> Callable[[DownloadProgress], None]:
    last_s = 0.0

    def show(progress: DownloadProgress) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s < REPORT_EVERY_S:
            return
        last_s = now_s
        say(_progress_row(progress))

    return show


def _progress_row(progress: DownloadProgress) -> dict[str, Any]:
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
        TextColumn("{task.fields[source]}", markup=False),
        console=Console(stderr=True),
    )


def bar_reporter(shown: Bars) -> Callable[[DownloadProgress], None]:
    tasks: dict[tuple[str, str], TaskID] = {}

    def show(progress: DownloadProgress) -> None:
        key = (progress.reference, progress.path)
        if key not in tasks:
            tasks[key] = shown.add_task(printable(progress.path), total=progress.total_bytes, source=progress.source)
        shown.update(tasks[key], completed=progress.done_bytes, total=progress.total_bytes, source=progress.source)

    return show


def _run(work: Callable[[WeightStore], Awaitable[T]], folder: Path | None) -> T:
    """Run with the store open; our errors become one line and exit code 1."""

    async def main() -> T:
        refuse_unknown(CommonSettings, WeightsSettings)
        settings = load(WeightsSettings)
        if folder is not None:
            settings = settings.model_copy(update={"dir": folder})
        async with WeightStore.open(settings) as store:
            return await work(store)

    folder = folder.expanduser().absolute() if folder else None
    logs.configure(level="warning", style="console", service="weights")
    try:
        return asyncio.run(main())
    except (FanlightError, SettingsError) as error:
        reason = f"{error.reason}: " if isinstance(error, FanlightError) else ""
        print(printable(f"error: {reason}{error}"), file=sys.stderr)
        raise typer.Exit(1) from error
    except (OSError, sqlite3.Error) as error:
        place = getattr(error, "filename", None) or f"the store {folder or load(WeightsSettings).dir}"
        reason = getattr(error, "strerror", None) or str(error)
        print(printable(f"error: {place} cannot be used: {reason}"), file=sys.stderr)
        raise typer.Exit(1) from error


def _print(value: Any) -> None:
    print(json.dumps(value), flush=True)


@app.command()
def plan(
    references: References,
    pipeline: Pipeline = "",
    precision: Precision = "fp16",
    safety_checker: Checker = False,
    as_json: Json = False,
    folder: Dir = None,
) -> None:
    """Show which files would be downloaded, which not and why, and how many bytes that is."""

    async def work(store: WeightStore) -> list[FetchPlan]:
        selection = store.selection(pipeline, safety_checker=safety_checker, precision=precision)
        return await store.plan(references, selection)

    plans = _run(work, folder)
    _print(plan_to_json(plans)) if as_json else show_plans(plans)


@app.command()
def fetch(
    references: References,
    pipeline: Pipeline = "",
    precision: Precision = "fp16",
    safety_checker: Checker = False,
    sha256: Sha256 = "",
    as_json: Json = False,
    folder: Dir = None,
) -> None:
    """Download what is not in the store yet; several processes share one download."""
    begin_s = time.monotonic()

    async def work(store: WeightStore) -> list[Fetched]:
        selection = store.selection(pipeline, safety_checker=safety_checker, precision=precision)
        with contextlib.nullcontext() if as_json else bars() as shown:
            report = bar_reporter(shown) if shown else json_reporter(_print)
            names = store.catalog.expand(references)
            return [await store.fetch(name, selection, sha256=sha256, report=report) for name in names]

    fetched = _run(work, folder)
    if as_json:
        _print(_fetch_summary(fetched, time.monotonic() - begin_s))
    else:
        print("\n".join(printable(str(f.path)) for f in fetched))


def _fetch_summary(fetched: list[Fetched], seconds: float) -> dict[str, Any]:
    """The last line of `fetch --json`; its keys are a stable interface. `path` is the last reference's."""
    return {
        "path": str(fetched[-1].path),
        "bytes": sum(f.size_bytes for f in fetched),
        "downloaded_bytes": sum(f.downloaded_bytes for f in fetched),
        "seconds": round(seconds, 3),
        "paths": {f.reference: str(f.path) for f in fetched},
    }


@app.command()
def ls(as_json: Json = False, folder: Dir = None) -> None:
    """List the models in the store, most recently used first."""
    held = sorted(_run(lambda store: store.inventory(), folder), key=lambda m: -m.used_s)
    rows = [
        {"name": m.name, "bytes": m.size_bytes, "is_pinned": m.is_pinned, "used_time": _iso(m.used_s)} for m in held
    ]
    if as_json:
        _print(rows)
        return
    table = Table("name", "bytes", "pinned", "last used", box=None)
    for row in rows:
        pinned = "yes" if row["is_pinned"] else ""
        table.add_row(escape(str(row["name"])), f"{row['bytes']:,}", pinned, str(row["used_time"]))
    console().print(table)


def _iso(now_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))


@app.command()
def verify(as_json: Json = False, folder: Dir = None) -> None:
    """Check the sha256 of every object and remove damaged ones. Exit code 1 if there were any."""
    damaged = _run(lambda store: store.run(store.objects.verify_all), folder)
    if as_json:
        _print({"damaged": damaged})
    else:
        print("\n".join(damaged) or "all objects are intact")
    if damaged:
        raise typer.Exit(1)


@app.command()
def gc(as_json: Json = False, folder: Dir = None) -> None:
    """Garbage collection: remove objects that no model uses, and abandoned downloads."""
    freed = _run(lambda store: store.run(store.objects.collect), folder)
    _print({"freed_bytes": freed}) if as_json else print(f"freed {freed:,} bytes")


@app.command()
def pin(
    names: Names,
    off: Annotated[bool, typer.Option("--off", help="Allow eviction again.")] = False,
    folder: Dir = None,
) -> None:
    """Protect models from eviction."""

    def each(store: WeightStore) -> None:
        for name in names:
            store.objects.pin(name, not off)

    _run(lambda store: store.run(each, store), folder)


@app.command()
def digests(names: Names, folder: Dir = None) -> None:
    """Print the tensor digests of models as a catalog file, for FANLIGHT_WEIGHTS_CATALOG_DIR on other nodes."""

    def each(store: WeightStore) -> dict[str, Any]:
        tables = {sha: table for name in names for sha, table in store.objects.tables_of(name).items()}
        return {"tensor_tables": {sha: table.to_json() for sha, table in tables.items()}}

    _print(_run(lambda store: store.run(each, store), folder))


@app.command()
def publish(
    names: Names,
    to: Annotated[str, typer.Option("--to", help="A folder such as ./mirror, or s3://BUCKET/PREFIX.")],
    as_json: Json = False,
    folder: Dir = None,
) -> None:
    """Write models of the store to a mirror, packed without loss; other nodes list it in FANLIGHT_WEIGHTS_MIRRORS."""

    async def work(store: WeightStore) -> Published:
        place = destination(to, load(WeightsSettings), asyncio.get_running_loop())
        done: Published = await store.run(publish_models, store.objects, names, place)
        return done

    done = _run(work, folder)
    row = {
        "names": list(done.names),
        "bytes": done.size_bytes,
        "mirror_bytes": done.mirror_bytes,
        "written_bytes": done.written_bytes,
    }
    if as_json:
        _print(row)
    else:
        share = done.mirror_bytes / max(1, done.size_bytes)
        print(f"{printable(', '.join(done.names))}: {done.size_bytes:,} bytes as {done.mirror_bytes:,} ({share:.3f})")


@app.command()
def rm(names: Names, folder: Dir = None) -> None:
    """Remove models, and the objects that only they use."""
    freed = _run(lambda store: store.run(lambda: sum(store.objects.remove_model(name) for name in names)), folder)
    print(f"freed {freed:,} bytes")
