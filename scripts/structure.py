"""Figures of the code's structure, for any checkout: `python scripts/structure.py [--root DIR] [--json] [--name WORD]`.

Source means the Python files of `fanlight/` and `services/` without generated stubs. A place is one file that contains
a word, also as a part of a longer name: Python, proto and C files anywhere but in `tests/`, in `docs/`, in stubs and in
this script. It reads files and imports nothing of the checkout, so that commits which do not run are measured too.
"""

import argparse
import ast
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

ROOMS = ("fanlight", "services")
PLACE_SUFFIXES = (".py", ".proto", ".c")
# Folders at a checkout's root that hold none of its places; hidden ones are left out as well.
NOT_PLACES = ("tests", "docs", "dist", "build")
THIS_SCRIPT = "scripts/structure.py"
SMALL_LINES = 60
# (B, 3, H, W), (H/8, W/8, 3), (h, w): at least two dimensions with a comma between.
DIMENSION = r"(?:[A-Z0-9][A-Za-z0-9_]*|[bchnw])(?:\s*[-+*/]\s*\w+)*"
SHAPE = re.compile(rf"\(\s*(?:{DIMENSION}|\.\.\.)(?:\s*,\s*(?:{DIMENSION}|\.\.\.))+\s*,?\s*\)|\({DIMENSION},\)")
ARRAY = re.compile(r"\b(Tensor|ndarray|NDArray)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    median: float
    p90: int
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    name: str
    places: list[str]
    modules: int
    lines: int
    gateway_lines: int
    files_per_1000_lines: float
    file_lines: Spread
    largest_file: str
    small_with_one_importer: list[str]
    function_lines: Spread
    longest_function: str
    names_of_several_classes: dict[str, list[str]]
    array_functions: int
    array_functions_with_shapes: int
    array_functions_without: list[str]


def is_stub(path: Path) -> bool:
    return "_pb2" in path.name


@dataclass(frozen=True)
class Module:
    """One source file. `name` is what an import says: a package's `__init__.py` has the package's name."""

    path: Path
    relative: str
    name: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.relative)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def modules(root: Path) -> list[Module]:
    found = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            if is_stub(path):
                continue
            relative = path.relative_to(root)
            parts = relative.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(path, relative.as_posix(), name))
    return found


def places(root: Path, word: str) -> list[str]:
    """Files that contain the word, by the rule in this script's docstring."""
    found = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        outside = relative.parts[0] in NOT_PLACES or any(part.startswith(".") for part in relative.parts)
        if outside or path.suffix not in PLACE_SUFFIXES or is_stub(path) or relative.as_posix() == THIS_SCRIPT:
            continue
        if path.is_file() and word in path.read_text(encoding="utf-8", errors="replace"):
            found.append(relative.as_posix())
    return found


def functions(module: Module) -> Iterator[Function]:
    """All functions, nested ones too."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            yield node


def length(function: Function) -> int:
    """Lines from `def` to the end, without decorators."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def spread(values: list[int]) -> Spread:
    if not values:
        return Spread(median=0, p90=0, max=0)
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))]
    return Spread(median=statistics.median(ordered), p90=p90, max=ordered[-1])


def imports(module: Module, names: frozenset[str]) -> set[str]:
    """Which of the names the module imports, at its top or within functions.

    `from package import module` imports the module, `from package import name` the package.
    """
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in names else base)
    return (found & names) - {module.name}


def absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - 1 if module.is_package else node.level
    base = module.name.split(".")[: len(module.name.split(".")) - up]
    return ".".join([*base, *([node.module] if node.module else [])])


def small_with_one_importer(found: list[Module]) -> list[str]:
    """Modules of under 60 lines that exactly one other module imports; packages' `__init__.py` do not count."""
    names = frozenset(module.name for module in found)
    importers = Counter(name for module in found for name in imports(module, names))
    return [
        module.relative
        for module in found
        if module.lines < SMALL_LINES and importers[module.name] == 1 and not module.is_package
    ]


@dataclass(frozen=True, slots=True)
class Class:
    where: str
    bases: frozenset[str]
    methods: frozenset[str]

    @property
    def is_abstract(self) -> bool:
        return bool(self.bases & {"Protocol", "ABC"})

    def implements(self, name: str, other: "Class") -> bool:
        """By name, or because it has every public method of the other."""
        return name in self.bases or (bool(other.methods) and other.methods <= self.methods)


def class_of(module: Module, node: ast.ClassDef) -> Class:
    bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
    bases |= {keyword.value.attr for keyword in node.keywords if isinstance(keyword.value, ast.Attribute)}
    public = {part.name for part in node.body if isinstance(part, Function) and not part.name.startswith("_")}
    if any("ABCMeta" in ast.unparse(keyword.value) for keyword in node.keywords):
        bases.add("ABC")
    return Class(module.relative, frozenset(bases), frozenset(public))


def names_of_several_classes(found: Iterable[Module]) -> dict[str, list[str]]:
    """Public class names with several meanings, and the files that define them.

    A Protocol or ABC and the classes of its name that implement it are one meaning. Private names (`_Name`) stay
    within their module and do not count.
    """
    by_name: dict[str, list[Class]] = defaultdict(list)
    for module in found:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                by_name[node.name].append(class_of(module, node))
    return {
        name: [each.where for each in classes]
        for name, classes in sorted(by_name.items())
        if len(classes) > 1 and meanings(name, classes) > 1
    }


def meanings(name: str, classes: list[Class]) -> int:
    abstract = [each for each in classes if each.is_abstract]
    concrete = [each for each in classes if not each.is_abstract]
    strangers = [each for each in concrete if not any(each.implements(name, other) for other in abstract)]
    return len(abstract) + len(strangers)


def public_functions(module: Module) -> Iterator[tuple[str, Function]]:
    """Public functions of the module and public methods of its public classes."""

    def of(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
        for node in body:
            if isinstance(node, Function) and not node.name.startswith("_"):
                yield prefix + node.name, node
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from of(node.body, f"{prefix}{node.name}.")

    return of(module.tree.body, "")


def has_array(function: Function) -> bool:
    given = function.args
    annotations = [each.annotation for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    annotations += [each.annotation for each in (given.vararg, given.kwarg) if each]
    return any(ARRAY.search(ast.unparse(each)) for each in (*annotations, function.returns) if each)


def gives_shapes(function: Function) -> bool:
    return bool(SHAPE.search(ast.get_docstring(function) or ""))


def measure(root: Path, name: str) -> Figures:
    found = modules(root)
    lines = {module.relative: module.lines for module in found}
    lengths = {
        f"{module.relative}:{function.lineno} {function.name}": length(function)
        for module in found
        for function in functions(module)
    }
    arrays = [
        (f"{module.relative}:{function.lineno} {full}", gives_shapes(function))
        for module in found
        for full, function in public_functions(module)
        if has_array(function)
    ]
    total, filled = sum(lines.values()), [count for count in lines.values() if count]
    return Figures(
        name=name,
        places=places(root, name),
        modules=len(found),
        lines=total,
        gateway_lines=sum(count for path, count in lines.items() if path.startswith("services/gateway/")),
        files_per_1000_lines=round(1000 * len(filled) / max(total, 1), 1),
        file_lines=spread(filled),
        largest_file=max(lines, key=lambda path: lines[path], default=""),
        small_with_one_importer=small_with_one_importer(found),
        function_lines=spread(list(lengths.values())),
        longest_function=max(lengths, key=lambda function: lengths[function], default=""),
        names_of_several_classes=names_of_several_classes(found),
        array_functions=len(arrays),
        array_functions_with_shapes=sum(given for _, given in arrays),
        array_functions_without=[where for where, given in arrays if not given],
    )


def report(figures: Figures) -> str:
    several = figures.names_of_several_classes
    files, lengths = figures.file_lines, figures.function_lines
    rows = [
        f"{len(figures.places):>7}  places that name {figures.name}",
        f"{figures.modules:>7}  modules",
        f"{figures.lines:>7}  lines",
        f"{figures.gateway_lines:>7}  lines in services/gateway",
        f"{figures.files_per_1000_lines:>7}  files per 1,000 lines, empty ones left out",
        f"{files.median:>7g}  lines in a file, median; p90 {files.p90}, most {files.max} ({figures.largest_file})",
        f"{len(figures.small_with_one_importer):>7}  files under {SMALL_LINES} lines with one importer",
        f"{lengths.median:>7g}  lines in a function, median; p90 {lengths.p90}, most {lengths.max}"
        f" ({figures.longest_function})",
        f"{len(several):>7}  class names that stand for several classes",
        f"{figures.array_functions_with_shapes:>7}  of {figures.array_functions} public functions with arrays give"
        " shapes",
    ]
    details = [("place", path) for path in figures.places]
    details += [("small", path) for path in figures.small_with_one_importer]
    details += [("class", f"{name}: {', '.join(where)}") for name, where in several.items()]
    details += [("no shapes", where) for where in figures.array_functions_without]
    return "\n".join([*rows, "", *(f"{kind}: {what}" for kind, what in details)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to measure")
    parser.add_argument("--name", default="clip_skip", help="the word whose places are counted")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    if not (given.root / ROOMS[0]).is_dir():
        sys.exit(f"error: {given.root}: must be a checkout with {ROOMS[0]}/")
    figures = measure(given.root, given.name)
    print(json.dumps(asdict(figures), indent=2) if given.json else report(figures))


if __name__ == "__main__":
    main()
