"""Every name that others rely on, and whether docs/renames.toml accounts for those that changed.

`PYTHONPATH=. python scripts/names.py` prints the names of this checkout as JSON; `tests/golden/names_before.json` holds
what it printed before the renames began. A name counts under the table of docs/renames.toml where its rename belongs:

- `proto.messages`: messages, enums and services; `proto.fields`: their fields, oneofs, values and RPCs, all in full
- `json`: routes of the HTTP API, their query parameters, and keys of JSON objects, each key once wherever it stands
- `settings`: FANLIGHT_ names of the environment
- `cli`: commands with their options and arguments
- `metrics`, `log_events`, `modules`
"""

import ast
import difflib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = ("fanlight", "services")
TABLES = ("proto.messages", "proto.fields", "json", "settings", "cli", "metrics", "log_events", "modules")
LOG_METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical"})
# Words that leave, for guesses of new names.
WORDS = {"picture": "image", "licence": "license", "catalogue": "catalog"}
LOGGER = re.compile(r"(^|[._])log(ger)?$")
SETTING = re.compile(r"FANLIGHT_[A-Z0-9_]*[A-Z0-9]")
METRIC = re.compile(r"^# TYPE (fanlight_\w+) ", re.MULTILINE)
OPEN_LIMIT_S = 30

Names = Mapping[str, frozenset[str]]


def names() -> Names:
    """The names of this checkout by table. Starts a gateway for a moment: some names stand in its answers alone."""
    messages, fields = proto_names()
    metrics, keys = gateway_names()
    found = {
        "proto.messages": messages,
        "proto.fields": fields,
        "json": keys,
        "settings": settings(),
        "cli": cli_names(),
        "metrics": metrics,
        "log_events": log_events(),
        "modules": modules(),
    }
    return {table: frozenset(found[table]) for table in TABLES}


def sources() -> Iterator[Path]:
    for room in ROOMS:
        yield from (path for path in sorted((ROOT / room).rglob("*.py")) if "_pb2" not in path.name)


def nodes() -> Iterator[ast.AST]:
    for path in sources():
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def modules() -> set[str]:
    found = set()
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def log_events() -> set[str]:
    """First arguments of `log.info("x", ...)` and the like."""
    found = set()
    for node in nodes():
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        event, is_log = node.args[0], LOGGER.search(ast.unparse(node.func.value)) is not None
        if (
            is_log
            and node.func.attr in LOG_METHODS
            and isinstance(event, ast.Constant)
            and isinstance(event.value, str)
        ):
            found.add(event.value)
    return found


def settings() -> set[str]:
    """Of the settings page, and those that code names as a whole, such as what the command line reads."""
    from scripts.settings import SECTIONS, rows

    found = {row.split("`")[1] for _, kinds in SECTIONS for kind in kinds for row in rows(kind)}
    for node in nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SETTING.fullmatch(node.value):
            found.add(node.value)
    return found


def proto_names() -> tuple[set[str], set[str]]:
    """Full names of what has members, and of the members."""
    import fanlight

    messages: set[str] = set()
    fields: set[str] = set()

    def add_enum(enum: Any) -> None:
        messages.add(enum.full_name)
        # A value's own full name leaves its enum out.
        fields.update(f"{enum.full_name}.{value.name}" for value in enum.values)

    def add_message(message: Any) -> None:
        if message.GetOptions().map_entry:
            return
        messages.add(message.full_name)
        real = [oneof for oneof in message.oneofs if not oneof.name.startswith("_")]
        fields.update(f"{message.full_name}.{each.name}" for each in (*message.fields, *real))
        for enum in message.enum_types:
            add_enum(enum)
        for nested in message.nested_types:
            add_message(nested)

    for found in pkgutil.walk_packages(fanlight.__path__, "fanlight."):
        if not found.name.endswith("_pb2"):
            continue
        file = importlib.import_module(found.name).DESCRIPTOR
        for message in file.message_types_by_name.values():
            add_message(message)
        for enum in file.enum_types_by_name.values():
            add_enum(enum)
        for service in file.services_by_name.values():
            messages.add(service.full_name)
            fields.update(f"{service.full_name}.{method.name}" for method in service.methods)
    return messages, fields


def cli_names() -> set[str]:
    """`fanlight jobs list`, `fanlight jobs list --json`, `fanlight jobs get NAME`; and the options of `python -m`."""
    import typer

    from fanlight.cli.main import COMMANDS_GROUP, build

    found: set[str] = set()

    def add(command: Any, path: str) -> None:
        found.add(path)
        for parameter in command.params:
            written = [*parameter.opts, *parameter.secondary_opts]
            is_option = any(each.startswith("-") for each in written)
            found.update(f"{path} {each if is_option else each.upper()}" for each in written)
        for name, inner in getattr(command, "commands", {}).items():
            add(inner, f"{path} {name}")

    add(typer.main.get_command(build()), "fanlight")
    # A service's own commands are loaded one at a time, when asked for.
    for entry in entry_points(group=COMMANDS_GROUP):
        group: Any = typer.main.get_command(build(wanted=entry.name))
        add(group.commands[entry.name], f"fanlight {entry.name}")
    return found | set(argparse_options())


def argparse_options() -> Iterator[str]:
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == "add_argument":
                written = [given.value for given in node.args if isinstance(given, ast.Constant)]
                yield from (f"python -m {module} {each}" for each in written if isinstance(each, str))


def gateway_names() -> tuple[set[str], set[str]]:
    """Metrics and JSON names, as a gateway without workers reports them."""
    with tempfile.TemporaryDirectory() as folder:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FANLIGHT_")}
        environment = {
            **inherited,
            "PYTHONPATH": str(ROOT),
            "FANLIGHT_GATEWAY_DATA_DIR": folder,
            "FANLIGHT_GATEWAY_GRPC": "127.0.0.1:0",
            "FANLIGHT_GATEWAY_HTTP": "127.0.0.1:0",
        }
        command = [sys.executable, "-m", "services.gateway"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"ready grpc=\S+ http=(\S+)\n", line)
            assert found, f"the gateway did not start: {line!r}"
            metrics = _get(f"http://{found[1]}/metrics")
            document = json.loads(_get(f"http://{found[1]}/openapi.json"))
        finally:
            process.kill()
            process.wait()
    return set(METRIC.findall(metrics)), set(json_names(document))


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=OPEN_LIMIT_S) as answer:
        return str(answer.read(), "utf-8")


def json_names(document: Mapping[str, Any]) -> Iterator[str]:
    """Routes, query parameters (`GET /v1/jobs ?state`) and keys of an OpenAPI document."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            route = f"{method.upper()} {path}"
            yield route
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "query":
                    yield f"{route} ?{parameter['name']}"
    yield from _keys(document)


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        properties = value.get("properties")
        if isinstance(properties, Mapping):
            yield from properties
        for inner in value.values():
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


# What stands between a name and a longer one that belongs to it: a rename of the first one renames the second.
SEPARATORS = {"proto.messages": ".", "proto.fields": ".", "json": " ", "cli": " ", "modules": "."}


def flattened(document: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The tables of docs/renames.toml by their dotted names. ValueError for a table that is none of them."""
    proto = document.get("proto", {})
    tables = {**{f"proto.{name}": table for name, table in proto.items()}, **document}
    tables.pop("proto", None)
    if unknown := set(tables) - set(TABLES):
        raise ValueError(f"{', '.join(sorted(unknown))}: must be one of {', '.join(TABLES)}")
    return {table: dict(tables.get(table, {})) for table in TABLES}


def problems(renames: Mapping[str, Mapping[str, str]], before: Names, now: Names) -> list[str]:
    """What is wrong with the list of renames, one line each; names that it lacks as lines that can be added to it."""
    found = []
    for table in TABLES:
        own = renames[table]
        parents = {**(renames["proto.messages"] if table == "proto.fields" else {}), **own}
        gone = sorted(before[table] - now[table])
        fresh = now[table] - before[table]
        if missing := [old for old in gone if old not in own and not _follows(table, old, parents, now[table])]:
            likely = {old: _inherited(table, old, parents) or old for old in missing}
            lines = [f'"{old}" = "{_guess(table, likely[old], fresh)}"' for old in missing]
            found += [f"add to [{table}]:", *lines]
        found += _wrong(table, own, before[table], now[table])
    return found


def _wrong(table: str, renames: Mapping[str, str], before: frozenset[str], now: frozenset[str]) -> Iterator[str]:
    for old, new in sorted(renames.items()):
        if old not in before:
            yield f'[{table}] "{old}": remove it, there was no such name'
        elif old in now:
            yield f'[{table}] "{old}": remove it, the name is still there'
        elif new and new not in now:
            yield f'[{table}] "{old}" = "{new}": must name what is there now; there is no "{new}"'


def _follows(table: str, old: str, renames: Mapping[str, str], now: frozenset[str]) -> bool:
    """Whether the rename of what the name belongs to accounts for it: a message's for its fields, and so on.

    A removed message or command takes its fields or options with it; a removed package does not take its modules.
    """
    inherited = _inherited(table, old, renames)
    return inherited in now or (inherited == "" and table != "modules")


def _inherited(table: str, old: str, renames: Mapping[str, str]) -> str | None:
    """What the listed rename of the nearest thing that the name belongs to makes of it; "" if that was removed."""
    separator, parent, rest = SEPARATORS.get(table), old, ""
    while separator and separator in parent:
        parent, _, last = parent.rpartition(separator)
        rest = separator + last + rest
        if parent in renames:
            return renames[parent] and renames[parent] + rest
    return None


def _guess(table: str, likely: str, fresh: frozenset[str]) -> str:
    """The new name that is most like this one: where it would stand, or of the same last word elsewhere; or ""."""
    for word, other in WORDS.items():
        likely = re.sub(word, other, re.sub(word.upper(), other.upper(), likely))
    if likely in fresh:
        return likely
    separator = SEPARATORS.get(table, "\n")
    place, _, last = likely.rpartition(separator)
    split = {name: name.rpartition(separator) for name in sorted(fresh)}
    beside = {parts[2]: name for name, parts in split.items() if parts[0] == place}
    if close := difflib.get_close_matches(last, beside, n=1, cutoff=0.7):
        return beside[close[0]]
    moved = [name for name, parts in split.items() if parts[2] == last]
    return moved[0] if len(moved) == 1 else ""


def removed_without_reason(text: str) -> list[str]:
    """Lines of docs/renames.toml for removed names without a comment: after it, or above it and those next to it."""
    found, has_reason = [], False
    for line in text.splitlines():
        is_removed = re.search(r'=\s*""', line) is not None
        has_reason = "#" in line or (has_reason and is_removed)
        if is_removed and not has_reason:
            found.append(line)
    return found


def main() -> None:
    found = {table: sorted(values) for table, values in names().items()}
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
