"""Run inside the build: puts a layer's packages into /layers/LAYER, less what no service needs, compiled ahead.

usage: python3 install.py LAYER [--packages LIST] [WHEEL...]
/wheels: the wheels, those of a list alone in /wheels/LIST; ../locks/LIST.txt: what to install of them, to the version
and the sha256, which pip holds every wheel to; no package index is asked. A WHEEL is our own, built beside them.
"""

import argparse
import hashlib
import py_compile
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import cache_from_source
from pathlib import Path

HERE = Path(__file__).parent
WHEELS = Path("/wheels")
LAYERS = Path("/layers")
# The header of a 64-bit ELF file, and one of its segments.
ELF = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
# A smaller symbol table is left where it is, for whoever looks at a crash.
STRIP_BYTES_MIN = 64 * 1024
# Prints the file of every module that was loaded by importing what it is told.
LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print("\\n".join(filter(None, (getattr(module, "__file__", None) for module in list(sys.modules.values())))))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("layer")
    parser.add_argument("--packages", metavar="LIST", help="where it is not the layer's name")
    parser.add_argument("wheels", nargs="*")
    asked = parser.parse_args()
    out = LAYERS / asked.layer
    chosen = asked.packages or asked.layer
    locked = ["--require-hashes", "--requirement", str(HERE.parent / "locks" / f"{chosen}.txt")]
    install(asked.wheels or locked, out, own=WHEELS / chosen)
    removed = sum(remove(path) for path in unneeded(out)) + sum(strip(path) for path in out.rglob("*.so*"))
    layer = tomllib.loads((HERE.parent / "layers.toml").read_text())["layers"].get(asked.layer, {})
    compile_ahead(out, layer.get("compiled_by", ()), layer.get("below", ()), layer.get("compiled", ()))
    print(f"{asked.layer}: {size_of(out):,} bytes, {removed:,} taken out")


def install(what: Iterable[str], out: Path, *, own: Path) -> None:
    """pip runs from its own wheel, so the base image needs none. `own`: a folder of wheels for this list alone."""
    pip = trusted_pip()
    command = [sys.executable, f"{pip}/pip", "install", "--quiet", "--root-user-action=ignore", "--no-cache-dir"]
    offline = ["--no-index", "--find-links", str(WHEELS), "--no-deps", "--no-compile", "--target", str(out)]
    beside = ["--find-links", str(own)] if own.is_dir() else []
    subprocess.run([*command, *offline, *beside, *what], check=True)


def trusted_pip() -> Path:
    """The wheel of pip that build.txt names. It checks the others, so it is checked here. SystemExit if it is not."""
    lines = (HERE.parent / "locks" / "build.txt").read_text().splitlines()
    pinned, _, sha256 = next(line for line in lines if line.startswith("pip==")).partition(" --hash=sha256:")
    wheel = WHEELS / f"pip-{pinned.partition('==')[2]}-py3-none-any.whl"
    if not wheel.exists() or hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"error: {wheel} is not what docker/locks/build.txt names; run docker/build.py wheels")
    return wheel


def unneeded(out: Path) -> Iterator[Path]:
    """Everything that a rule of prune.toml names."""
    for rule in tomllib.loads((HERE / "prune.toml").read_text())["rule"]:
        kept = {path for pattern in rule.get("but", ()) for path in out.glob(pattern)}
        found = sorted({path for pattern in rule["paths"] for path in out.glob(pattern)} - kept)
        yield from (path for path in found if path.exists())


def remove(path: Path) -> int:
    """The bytes that are gone."""
    if path.is_dir() and not path.is_symlink():
        size = sum(remove(each) for each in list(path.iterdir()))
        path.rmdir()
        return size
    size = path.lstat().st_size
    path.unlink()
    return size


def strip(path: Path) -> int:
    """Cuts off what lies behind the last byte that a loader maps: symbol tables, debug sections. The bytes cut off.

    As sstrip of the ELF kickers does it; the base image has no binutils.
    """
    with path.open("r+b") as file:
        head = file.read(ELF.size)
        if head[:6] != b"\x7fELF\x02\x01":
            return 0
        fields = list(ELF.unpack(head))
        begin, size, count = fields[5], fields[9], fields[10]
        file.seek(begin)
        segments = [SEGMENT.unpack_from(file.read(size)) for _ in range(count)]
        end = max(begin + size * count, *(offset + length for _, _, offset, _, _, length, _, _ in segments))
        cut = int(path.stat().st_size - end)
        if cut < STRIP_BYTES_MIN:
            return 0
        # There is no table of sections any more.
        fields[6] = fields[12] = fields[13] = 0
        file.seek(0)
        file.write(ELF.pack(*fields))
        file.truncate(end)
        return cut


def compile_ahead(out: Path, loaded_by: Iterable[str], below: Iterable[str], globs: Iterable[str] = ()) -> None:
    """Compiled by content, not by time: the same bytes whenever it is built, and a read-only root starts as fast."""
    named = {path for pattern in globs for path in out.glob(pattern)}
    folders = [out, *(LAYERS / name for name in below)]
    for path in sorted({*loaded(folders, loaded_by), *named} if loaded_by else out.rglob("*.py")):
        inside = path.relative_to(next(folder for folder in folders if path.is_relative_to(folder)))
        compiled = cache_from_source(str(inside))
        # What a layer below has not compiled goes into this one, and lies beside its source in the image.
        if not any((folder / compiled).exists() for folder in folders):
            compile_one(path, out / compiled, inside)


def compile_one(path: Path, compiled: Path, inside: Path) -> None:
    try:
        py_compile.compile(
            str(path),
            cfile=str(compiled),
            dfile=str(Path("/opt/fanlight/lib", inside)),
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    except py_compile.PyCompileError as error:
        print(f"not compiled, it is a template or for another Python: {path}: {error.exc_type_name}")


def loaded(folders: Sequence[Path], modules: Iterable[str]) -> list[Path]:
    """The source files in the folders that importing the modules loads."""
    environ = {"PYTHONPATH": ":".join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    done = subprocess.run([sys.executable, "-c", LOADED, *modules], env=environ, stdout=subprocess.PIPE, check=True)
    paths = (Path(line) for line in done.stdout.decode().splitlines() if line.endswith(".py"))
    return sorted(path for path in paths if any(path.is_relative_to(folder) for folder in folders))


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
