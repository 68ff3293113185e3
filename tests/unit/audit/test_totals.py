"""The audit's sums beside those of the programs that everybody has: du, and skopeo where it is installed."""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile

import pytest
from audit.report import describe
from audit.sources import load

LAYERS = [
    {f"usr/lib/package/{number}.py": os.urandom(number * 37) for number in range(1, 200)},
    {"usr/lib/package/150.py": b"another", "usr/lib/package/.wh.151.py": b"", "opt/app": os.urandom(300_000)},
    {"opt/other/app": os.urandom(40_000), "opt/.wh.app": b""},
]
WITHIN = 0.01


def unpack(layout, name, folder):
    """As a container engine does it: layer by layer, whiteouts applied."""
    manifest = json.loads(layout.blob(layout_digest(layout, name)).read_text())
    for layer in manifest["layers"]:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(layout.blob(layer["digest"]).read_bytes()))) as tar:
            for member in tar:
                place, _, file = member.name.rpartition("/")
                if file.startswith(".wh."):
                    (folder / place / file.removeprefix(".wh.")).unlink()
                else:
                    tar.extract(member, folder, filter="data")


def layout_digest(layout, name):
    index = json.loads((layout.root / "index.json").read_text())
    return index["manifests"][0]["digest"]


@pytest.mark.skipif(shutil.which("du") is None, reason="du is not installed")
def test_a_container_sees_as_many_bytes_as_du_counts(layout, tmp_path):
    name = layout.add("it", LAYERS)
    (tmp_path / "root").mkdir()
    unpack(layout, name, tmp_path / "root")
    files = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    du = subprocess.run(["du", "--apparent-size", "--block-size=1", *files], capture_output=True, text=True, check=True)
    counted = sum(int(line.split()[0]) for line in du.stdout.splitlines())
    assert describe(load(name, "linux/amd64"))["rootfs_bytes"] == pytest.approx(counted, rel=WITHIN)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_layers_are_as_large_as_skopeo_says(layout):
    name = layout.add("it", LAYERS)
    done = subprocess.run(["skopeo", "inspect", "--raw", name], capture_output=True, text=True, check=True)
    sizes = [layer["size"] for layer in json.loads(done.stdout)["layers"]]
    image = load(name, "linux/amd64")
    assert [layer.compressed_bytes for layer in image.layers] == sizes
    assert describe(image)["compressed_bytes"] == sum(sizes)
