"""What happens to packages on their way into a layer."""

import contextlib
import importlib.util
import json
import shutil
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.fakes.images import OciLayout

BUILD = Path(__file__).parents[3] / "docker" / "install"


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("docker_build_install", BUILD / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def test_tests_headers_static_libraries_and_stubs_are_taken_out(install, tmp_path):
    put(
        tmp_path,
        "a/tests/test_a.py",
        "a/b/c/d/e/tests/x.py",
        "torch/include/x.h",
        "a/x.a",
        "a/x.pyi",
        "a/x.py",
        "a/test.py",
    )
    for path in install.unneeded(tmp_path):
        install.remove(path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {"a/x.py", "a/test.py"}


def test_of_the_starter_model_its_manifest_and_licenses_stay(install, tmp_path):
    put(tmp_path, *(f"fanlight/starter/{name}" for name in ("MANIFEST.json", "NOTICE", "LICENSES/x", "model/x.bin")))
    put(tmp_path, "botocore/data/s3/x.json", "botocore/data/ec2/x.json", "botocore/data/endpoints.json")
    for path in install.unneeded(tmp_path):
        install.remove(path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {
        "fanlight/starter/MANIFEST.json",
        "fanlight/starter/NOTICE",
        "fanlight/starter/LICENSES/x",
        "botocore/data/s3/x.json",
        "botocore/data/endpoints.json",
    }


def test_every_rule_says_why():
    rules = tomllib.loads((BUILD / "prune.toml").read_text())["rule"]
    assert rules
    assert all(rule["why"] and rule["paths"] for rule in rules)


def largest_extension():
    """A compiled module of this Python that carries a symbol table."""
    import zstandard.backend_c as module

    return Path(module.__file__)


def test_a_stripped_library_is_smaller_and_still_works(install, tmp_path):
    source = largest_extension()
    package = tmp_path / "zstandard"
    shutil.copytree(source.parent, package, ignore=shutil.ignore_patterns("_cffi*", "__pycache__"))
    cut = install.strip(package / source.name)
    assert cut > install.STRIP_BYTES_MIN
    assert (package / source.name).stat().st_size == source.stat().st_size - cut
    program = "import zstandard as z; assert z.decompress(z.compress(b'x' * 999)) == b'x' * 999; print(z.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))


def test_what_is_no_elf_file_is_left_alone(install, tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"no ELF" * 100_000)
    assert install.strip(path) == 0
    path.write_bytes(b"")
    assert install.strip(path) == 0


def test_a_compiled_module_is_believed_by_content_not_by_time(install, tmp_path):
    put(tmp_path, "a/x.py")
    (tmp_path / "a" / "x.py").write_text("VALUE = 1\n")
    install.compile_ahead(tmp_path, (), ())
    compiled = next((tmp_path / "a" / "__pycache__").glob("x.*.pyc")).read_bytes()
    flags = struct.unpack("<I", compiled[4:8])[0]
    assert flags == 0b01, "checked by hash, and unchecked at import"


def test_a_large_package_is_compiled_only_where_it_is_loaded(install, tmp_path):
    put(tmp_path, "big/__init__.py", "big/used.py", "big/unused.py", "big/named/later.py")
    for path in (tmp_path / "big").rglob("*.py"):
        path.write_text("")
    (tmp_path / "big" / "__init__.py").write_text("from big import used\n")
    install.compile_ahead(tmp_path, ("big",), (), ("big/named/*.py",))
    names = {path.name.partition(".")[0] for path in (tmp_path / "big").rglob("__pycache__/*")}
    assert names == {"__init__", "used", "later"}


def test_what_a_layer_below_left_uncompiled_is_compiled_into_the_layer_that_loads_it(install, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "LAYERS", tmp_path)
    put(tmp_path, "low/big/__init__.py", "low/big/seldom.py", "high/user.py")
    for path in (tmp_path / "low" / "big").iterdir():
        path.write_text("")
    (tmp_path / "high" / "user.py").write_text("import big.seldom\n")
    install.compile_ahead(tmp_path / "low", ("big",), ())
    install.compile_ahead(tmp_path / "high", ("user",), ("low",))
    compiled = {str(path.relative_to(tmp_path)).partition(".")[0] for path in tmp_path.rglob("*.pyc")}
    assert compiled == {"low/big/__pycache__/__init__", "high/big/__pycache__/seldom", "high/__pycache__/user"}


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docker_build", BUILD.parent / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BUILD.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BUILD.parent))
    return module


@pytest.mark.parametrize(("platform", "is_whole"), [("linux_x86_64", True), ("any", False)])
def test_no_image_is_made_of_a_wheel_without_what_is_compiled(build, tmp_path, monkeypatch, platform, is_whole):
    put(tmp_path, "pip-1-py3-none-any.whl", "fanlight-0-py3-none-any.whl")
    monkeypatch.setattr(build, "WHEELS", tmp_path)
    monkeypatch.setattr(build, "_is_here", lambda line: True)
    monkeypatch.setattr(build, "_run", lambda *command: put(tmp_path, f"fanlight-1-py3-none-{platform}.whl"))
    with contextlib.nullcontext() if is_whole else pytest.raises(SystemExit, match="apt-get install gcc"):
        build.make_wheels()
    assert [path.name for path in tmp_path.glob("fanlight-*")] == [f"fanlight-1-py3-none-{platform}.whl"]


def test_a_layout_keeps_nothing_of_earlier_builds(build, tmp_path):
    layout = OciLayout(tmp_path / "layout")
    layout.add("old", [{"a": b"old"}])
    kept = layout.add("new", [{"a": b"new"}])
    index = json.loads((layout.root / "index.json").read_text())
    del index["manifests"][0]["annotations"]
    (layout.root / "index.json").write_text(json.dumps(index))
    build.drop_stale(layout.root)
    assert len(list((layout.root / "blobs" / "sha256").iterdir())) == 3
    assert len(json.loads((layout.root / "index.json").read_text())["manifests"]) == 1
    assert kept.endswith(":new")
