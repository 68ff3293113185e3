"""The report as a table for a terminal and as Markdown: the same rows, other rules."""

from collections.abc import Iterator, Sequence
from typing import Any

FINDINGS_SHOWN = 40
DISTRIBUTIONS_SHOWN = 25

Rows = Sequence[Sequence[str]]


def megabytes(size_bytes: int) -> str:
    """In a smaller unit where that would say nothing."""
    if abs(size_bytes) >= 100_000:
        return f"{size_bytes / 1e6:,.1f} MB"
    return f"{size_bytes / 1e3:,.1f} kB" if abs(size_bytes) >= 1000 else f"{size_bytes} B"


def _difference_of(size_bytes: int) -> str:
    return f"{'+' if size_bytes > 0 else ''}{megabytes(size_bytes)}"


def sections(report: dict[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Title, head and rows of each table."""
    for title, head, rows in _sections(report):
        yield title, head, [[printable(cell) for cell in row] for row in rows]


def printable(cell: str) -> str:
    """A path may have any byte in it; a terminal is sent none of them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cell)


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    for image in report["images"]:
        name = image["name"]
        yield name, ("what", "bytes"), _totals(image)
        yield f"{name}: layers", ("compressed", "unpacked", "files", "made by", "shared with"), _layers(image)
        yield f"{name}: Python distributions", ("bytes", "files", "name"), _distributions(image)
        yield f"{name}: what to fix, most bytes first", ("bytes", "kind", "path", "why"), _findings(image)
        if "against" in image:
            yield f"{name}: against {image['against']['name']}", ("bytes", "why", "path"), _difference(image["against"])
    yield "the set", ("what", "bytes"), [(key, megabytes(size)) for key, size in report["set"].items()]
    if report["broken"]:
        yield "broken budgets", ("budget",), [(line,) for line in report["broken"]]


def _totals(image: dict[str, Any]) -> Rows:
    rows = [
        ("compressed", megabytes(image["compressed_bytes"])),
        ("unpacked, all layers", megabytes(image["unpacked_bytes"])),
        ("unpacked, as a container sees it", megabytes(image["rootfs_bytes"])),
    ]
    rows += [(f"of it {reason}", megabytes(size)) for reason, size in image["reasons"].items()]
    ready = image["ready"]
    rows.append(("to fetch for a node", megabytes(ready["fetch_bytes"])))
    rows += [(f"ready at {rate} Mbit/s", f"{seconds:,} s") for rate, seconds in ready["seconds"].items()]
    return rows


def _layers(image: dict[str, Any]) -> Rows:
    return [
        (
            f"{'about ' if layer['is_estimate'] else ''}{megabytes(layer['compressed_bytes'])}",
            megabytes(layer["unpacked_bytes"]),
            str(layer["files"]),
            " ".join(layer["command"].split())[:70],
            ", ".join(layer.get("shared_with", ())),
        )
        for layer in image["layers"]
    ]


def _distributions(image: dict[str, Any]) -> Rows:
    return [
        (megabytes(each["bytes"]), str(each["files"]), f"{each['name']} {each['version']}".strip())
        for each in image["distributions"][:DISTRIBUTIONS_SHOWN]
    ]


def _findings(image: dict[str, Any]) -> Rows:
    rows = [
        (megabytes(each["bytes"]), each["kind"], each["path"], each["why"])
        for each in image["findings"][:FINDINGS_SHOWN]
    ]
    left = image["findings"][FINDINGS_SHOWN:]
    if left:
        rows.append((megabytes(sum(each["bytes"] for each in left)), "", f"{len(left)} more", "see --format json"))
    return rows


def _difference(against: dict[str, Any]) -> Rows:
    head = [(_difference_of(against["compressed_bytes"]), "compressed, all in all", "")]
    return head + [(_difference_of(row["bytes"]), row["why"], row["path"]) for row in against["paths"][:FINDINGS_SHOWN]]


def as_table(report: dict[str, Any]) -> str:
    parts = []
    for title, head, rows in sections(report):
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        rule = "  ".join("-" * width for width in widths)
        parts.append("\n".join([title, "=" * len(title), lines[0], rule, *lines[1:]]))
    return "\n\n".join("\n".join(line.rstrip() for line in part.splitlines()) for part in parts) + "\n"


def as_markdown(report: dict[str, Any]) -> str:
    parts = []
    for title, head, rows in sections(report):
        lines = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in [head, *rows]]
        rule = "|" + "---|" * len(head)
        parts.append("\n".join([f"## {title}", "", lines[0], rule, *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
