"""Every waste that is planted is found, with its bytes, and nothing else is."""

import shutil
import subprocess

import pytest
from audit.findings import find
from audit.rootfs import merge
from audit.sources import load

from tests.fakes.images import Link

SITE = "usr/lib/python3/site-packages"


def noise(size: int, seed: int) -> bytes:
    """Bytes of a size that no other seed has."""
    return (f"{seed:08d}".encode() * (size // 8 + 1))[:size]


CLEAN = {
    "usr/bin/service": noise(5000, 1),
    f"{SITE}/app/__init__.py": noise(300, 2),
    f"{SITE}/latest/model.py": noise(300, 3),
    f"{SITE}/attest.py": noise(300, 4),
    "models/a/model.fp16.safetensors": noise(9000, 5),
    "models/b/weights.bin": noise(9000, 6),
    "usr/share/doc/x/copyright": noise(500, 7),
    "etc/empty": b"",
    "etc/empty2": b"",
    "usr/bin/link": Link("service"),
    "usr/bin/hard": Link("usr/bin/service", hard=True),
    "srv/.gitignore": noise(20, 8),
}

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
CLONE = {"srv/clone/.git/objects/ab/cd": noise(6000, 14), "srv/clone/.git/HEAD": noise(30, 15)}

PLANTED = {
    "duplicate": ({"models/c/copy": noise(9000, 6)}, "models/c/copy", 9000),
    "fp32 beside fp16": ({"models/a/model.safetensors": noise(18_000, 11)}, "models/a/model.safetensors", 18_000),
    "pickle beside safetensors": (
        {"models/d/net.pth": noise(7000, 12), "models/d/net.safetensors": noise(7001, 13)},
        "models/d/net.pth",
        7000,
    ),
    "git objects": (CLONE, "srv/clone/.git", 6030),
    "LFS pointer": (
        {"models/e/x.safetensors": POINTER},
        "models/e/x.safetensors",
        len(POINTER),
    ),
    "cache": ({"root/.cache/pip/http/aa": noise(5000, 16)}, "root/.cache/pip", 5000),
    "tests": ({f"{SITE}/app/tests/test_it.py": noise(4100, 17)}, f"{SITE}/app/tests", 4100),
    "documentation": ({"usr/share/doc/x/changelog.gz": noise(4200, 18)}, "usr/share/doc", 4200),
    "build tool": ({"usr/bin/x86_64-linux-gnu-gcc-12": noise(4300, 19)}, "usr/bin/x86_64-linux-gnu-gcc-12", 4300),
    "static library": ({"usr/lib/libz.a": noise(4400, 20)}, "usr/lib/libz.a", 4400),
}  # fmt: skip


def found(layout, *layers):
    image = load(layout.add("it", layers), "linux/amd64")
    return [(finding.kind, finding.path, finding.size_bytes) for finding in find(image, merge(image))]


def test_a_clean_image_has_no_findings(layout):
    assert found(layout, CLEAN) == []


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_waste_is_found_alone(layout, kind):
    files, path, size = PLANTED[kind]

    assert found(layout, CLEAN, files) == [(kind, path, size)]


def test_all_of_it_is_found_together_most_bytes_first(layout):
    findings = found(layout, CLEAN, *(files for files, _, _ in PLANTED.values()))

    assert sorted(findings) == sorted((kind, path, size) for kind, (_, path, size) in PLANTED.items())
    assert [size for _, _, size in findings] == sorted((size for _, _, size in findings), reverse=True)


def test_what_a_later_layer_replaces_or_deletes_still_travels(layout):
    below = {"a/old": noise(5000, 30), "b/gone": noise(6000, 31), "c/one": noise(7000, 32), "c/two": noise(8000, 33)}
    above = {"a/old": noise(5001, 34), "b/.wh.gone": b"", "c/.wh..wh..opq": b"", "c/three": noise(4999, 35)}

    assert found(layout, below, above) == [
        ("deleted", "c/two", 8000),
        ("deleted", "c/one", 7000),
        ("deleted", "b/gone", 6000),
        ("overwritten", "a/old", 5000),
    ]


def test_a_whiteout_of_nothing_changes_nothing(layout):
    assert found(layout, CLEAN, {"nowhere/.wh.nothing": b"", "nowhere/.wh..wh..opq": b""}) == []


def test_a_loop_of_symlinks_is_nothing_special(layout):
    assert found(layout, CLEAN, {"loop/a": Link("b"), "loop/b": Link("a"), "loop/self": Link("self")}) == []


@pytest.mark.skipif(shutil.which("gcc") is None, reason="makes shared libraries with gcc, which is not here")
def test_a_library_that_nothing_links_to_and_debug_sections_are_found(layout, tmp_path):
    (tmp_path / "lib.c").write_text("int answer(void) { return 42; }\n")
    (tmp_path / "main.c").write_text("int answer(void); int main(void) { return answer(); }\n")
    for name, flags in {"libused.so.1": [], "libidle.so.1": [], "libdebug.so.1": ["-g"]}.items():
        source, soname = str(tmp_path / "lib.c"), f"-Wl,-soname,{name}"
        subprocess.run(["gcc", "-shared", *flags, soname, "-o", str(tmp_path / name), source], check=True)
    linked = [str(tmp_path / "libused.so.1"), str(tmp_path / "libdebug.so.1")]
    subprocess.run(
        ["gcc", "-o", str(tmp_path / "main"), str(tmp_path / "main.c"), "-Wl,--no-as-needed", *linked], check=True
    )
    libraries = {f"usr/lib/{each.name}": each.read_bytes() for each in tmp_path.glob("lib*.so.1")}

    kinds = {
        (kind, path) for kind, path, _ in found(layout, {**libraries, "usr/bin/main": (tmp_path / "main").read_bytes()})
    }

    assert kinds == {("unlinked library", "usr/lib/libidle.so.1"), ("debug symbols", "usr/lib/libdebug.so.1")}
