"""A layout's layers become zstd's, and stay what they were."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fakes.images import OciLayout, sha256, tar_of

pytestmark = pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
FILES = {"a/x": b"x" * 100_000}
PLAIN = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture(scope="module")
def repack():
    spec = importlib.util.spec_from_file_location("docker_repack", Path(__file__).parents[3] / "docker" / "repack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def manifest_of(layout, tag):
    entries = json.loads((layout.root / "index.json").read_text())["manifests"]
    (entry,) = (each for each in entries if tag in each["annotations"].values())
    content = layout.blob(entry["digest"]).read_bytes()
    assert (entry["digest"], entry["size"]) == (sha256(content), len(content))
    return json.loads(content)


def uncompressed(manifest):
    manifest["layers"][0]["mediaType"] = PLAIN


def test_a_bare_layer_is_compressed_and_unpacks_to_the_same_bytes(repack, tmp_path):
    layout = OciLayout(tmp_path / "layout")
    layout.add("it", [FILES], pack=bytes, change=uncompressed)
    repack.repack(layout.root, "it")
    (layer,) = manifest_of(layout, "it")["layers"]
    blob = layout.blob(layer["digest"]).read_bytes()
    assert layer == {"mediaType": f"{PLAIN}+zstd", "digest": sha256(blob), "size": len(blob)}
    assert subprocess.run(["zstd", "-dc"], input=blob, capture_output=True, check=True).stdout == tar_of(FILES)


def test_other_images_and_compressed_layers_are_left_alone(repack, tmp_path):
    layout = OciLayout(tmp_path / "layout")
    layout.add("packed", [FILES])
    layout.add("other", [FILES], pack=bytes, change=uncompressed)
    before = manifest_of(layout, "packed"), manifest_of(layout, "other")
    repack.repack(layout.root, "packed")
    assert (manifest_of(layout, "packed"), manifest_of(layout, "other")) == before
