"""Images as buildah, podman, skopeo, oras, nix and BuildKit write them, and what lies beside them."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
import time

import pytest
from audit.model import AuditError
from audit.sources import load

from tests.fakes.images import OCI, OciLayout, docker_archive, sha256, tar_of

PLATFORM = "linux/amd64"
FILES = [{"a": b"x" * 5000}, {"b": b"z" * 10_000}]
INDEX, MANIFEST = f"{OCI}.index.v1+json", f"{OCI}.manifest.v1+json"


def put(layout, value):
    return layout.put(json.dumps(value).encode())


def image(layout, files=FILES, **config):
    """The descriptor of an image, without a platform; its config says one."""
    tars = [tar_of(each) for each in files]
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [sha256(tar) for tar in tars]}} | config
    layers = [{"mediaType": f"{OCI}.layer.v1.tar+gzip", **blob(layout, gzip.compress(tar))} for tar in tars]
    manifest = {"config": {"mediaType": f"{OCI}.config.v1+json", "digest": put(layout, config)}, "layers": layers}
    return {"mediaType": MANIFEST, "digest": put(layout, manifest), "size": 1}


def blob(layout, data):
    return {"digest": layout.put(data), "size": len(data)}


def of(descriptor, architecture, system="linux"):
    return {**descriptor, "platform": {"os": system, "architecture": architecture}}


def attestation(layout):
    layer = {"mediaType": "application/vnd.in-toto+json", **blob(layout, b"{}")}
    config = {"mediaType": f"{OCI}.config.v1+json", "digest": put(layout, {"rootfs": {"diff_ids": [sha256(b"{}")]}})}
    return {"mediaType": MANIFEST, "digest": put(layout, {"config": config, "layers": [layer]}), "size": 1}


def buildkit_attestation(layout):
    annotations = {"vnd.docker.reference.type": "attestation-manifest"}
    return of({**attestation(layout), "annotations": annotations}, "unknown", "unknown")


def signature(layout):
    """A referrer of cosign's or notation's."""
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": layout.put(b"{}"), "size": 2}
    subject = {"mediaType": MANIFEST, "digest": sha256(b"it"), "size": 2}
    manifest = {"artifactType": "application/vnd.example", "config": config, "layers": [config], "subject": subject}
    return {"mediaType": MANIFEST, "digest": put(layout, manifest), "size": 1}


def chart(layout):
    config = {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": layout.put(b"{}"), "size": 2}
    return {"mediaType": MANIFEST, "digest": put(layout, {"config": config, "layers": [config]}), "size": 1}


BESIDE = {
    "nothing": lambda layout: [],
    "an attestation": lambda layout: [attestation(layout)],
    "BuildKit's attestation": lambda layout: [buildkit_attestation(layout)],
    "a signature": lambda layout: [signature(layout)],
    "a chart": lambda layout: [chart(layout)],
    "an image for another platform": lambda layout: [image(layout, FILES[:1], architecture="arm64")],
    "a manifest that was not copied": lambda layout: [of({"digest": sha256(b"gone"), "size": 1}, "arm64")],
    "one without a platform that was not copied": lambda layout: [{"digest": sha256(b"gone"), "size": 1}],
}


@pytest.mark.parametrize("nested", [False, True], ids=["in the layout", "in an index"])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("has_platform", [False, True])
def test_the_image_is_found_beside(layout, beside, nested, has_platform):
    one = image(layout)
    entries = [*BESIDE[beside](layout), of(one, "amd64") if has_platform else one, *BESIDE[beside](layout)]
    if nested:
        entries = [{"mediaType": INDEX, "digest": put(layout, {"mediaType": INDEX, "manifests": entries}), "size": 1}]
    (layout.root / "index.json").write_text(json.dumps({"manifests": entries}))
    found = load(f"oci:{layout.root}", PLATFORM)
    assert (found.digest, found.unpacked_bytes) == (one["digest"], 15_000)


def test_an_image_that_names_no_platform_anywhere_is_taken_where_it_is_the_only_one(layout):
    plain = image(layout, os="", architecture="")
    (layout.root / "index.json").write_text(
        json.dumps({"manifests": [{"digest": put(layout, {"manifests": [plain]})}]})
    )
    assert load(f"oci:{layout.root}", PLATFORM).unpacked_bytes == 15_000


def test_an_index_of_other_platforms_says_which_by_the_configs(layout):
    entries = [image(layout, architecture="arm64"), image(layout, FILES[:1], architecture="riscv64")]
    layout.tag("it", put(layout, {"mediaType": INDEX, "manifests": entries}))
    with pytest.raises(AuditError, match="no image for linux/amd64; there are linux/arm64, linux/riscv64"):
        load(f"oci:{layout.root}:it", PLATFORM)


def test_two_images_in_one_layout_are_told_by_their_tags(layout):
    layout.add("one", FILES)
    layout.add("two", FILES[:1])
    with pytest.raises(AuditError, match="2 images; name one as oci:DIR:TAG, of one, two"):
        load(f"oci:{layout.root}", PLATFORM)


def skippable(data=b"size", number=0):
    return struct.pack("<II", 0x184D2A50 + number, len(data)) + data


def zstd(data):
    return subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout


needs_zstd = pytest.mark.skipif(shutil.which("zstd") is None, reason="packs with zstd, which is not here")


@needs_zstd
@pytest.mark.parametrize(
    "pack",
    [
        lambda tar: skippable() + zstd(tar),
        lambda tar: skippable(b"", 15) + skippable() + zstd(tar),
        lambda tar: zstd(tar[:1000]) + skippable() + zstd(tar[1000:]) + skippable(b"toc" * 100, 4),
    ],
    ids=["first", "two of them", "between and behind"],
)
def test_frames_that_zstd_skips_are_skipped(layout, pack):
    assert load(layout.add("it", FILES, pack=pack), PLATFORM).unpacked_bytes == 15_000


@pytest.mark.parametrize(
    "pack", [lzma.compress, bz2.compress, lambda tar: gzip.compress(tar[:99]) + gzip.compress(tar[99:])]
)
def test_a_layer_may_be_packed_in_any_way_that_docker_takes(layout, pack):
    assert load(layout.add("it", FILES, pack=pack), PLATFORM).unpacked_bytes == 15_000


@needs_zstd
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, lzma.compress, bz2.compress])
@pytest.mark.parametrize("kind", ["docker", "oci"])
def test_an_archive_is_recognized_by_itself(tmp_path, pack, kind):
    if kind == "docker":
        docker_archive(tmp_path / "plain", FILES)
    else:
        OciLayout(tmp_path / "layout").add("it", FILES)
        with tarfile.open(tmp_path / "plain", "w") as tar:
            tar.add(tmp_path / "layout", ".")
    (tmp_path / "it.bin").write_bytes(pack((tmp_path / "plain").read_bytes()))
    for name in ("{}", "docker-archive:{}", "oci-archive:{}"):
        assert load(name.format(tmp_path / "it.bin"), PLATFORM).unpacked_bytes == 15_000


def test_an_archive_that_is_a_layout_and_one_of_dockers_at_once_is_read(tmp_path):
    """As docker has written them since version 25."""
    layout = OciLayout(tmp_path / "layout")
    layout.add("it", FILES)
    [top] = json.loads((layout.root / "index.json").read_text())["manifests"]
    manifest = json.loads(layout.blob(top["digest"]).read_text())
    names = [f"blobs/{each['digest'].replace(':', '/')}" for each in (manifest["config"], *manifest["layers"])]
    rows = [{"Config": names[0], "RepoTags": ["it:latest"], "Layers": names[1:]}]
    (layout.root / "manifest.json").write_text(json.dumps(rows))
    with tarfile.open(tmp_path / "it.tar", "w") as tar:
        tar.add(layout.root, ".")
    found = load(str(tmp_path / "it.tar"), PLATFORM)
    assert found.compressed_bytes == load(f"oci:{layout.root}", PLATFORM).compressed_bytes
    assert load(f"oci-archive:{tmp_path}/it.tar:it", PLATFORM).unpacked_bytes == 15_000


def test_a_folder_is_recognized_by_itself(layout, tmp_path):
    layout.add("it", FILES)
    assert load(str(layout.root), PLATFORM).unpacked_bytes == 15_000
    [top] = json.loads((layout.root / "index.json").read_text())["manifests"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for each in (layout.root / "blobs" / "sha256").iterdir():
        shutil.copy(each, flat / each.name)
    (flat / top["digest"].partition(":")[2]).rename(flat / "manifest.json")
    for name in (str(flat), f"dir:{flat}"):
        assert load(name, PLATFORM).digest == top["digest"]
    with pytest.raises(AuditError, match="a folder without an image"):
        load(str(tmp_path), PLATFORM)


def test_a_layouts_image_may_be_named_by_tag_and_digest(layout):
    name = layout.add("it", FILES)
    layout.add("other", FILES[:1])
    digest = load(name, PLATFORM).digest
    for written in (f"oci:{layout.root}:it@{digest}", f"oci:{layout.root}@{digest}"):
        assert load(written, PLATFORM).digest == digest
    (layout.root / "index.json").write_text(
        (layout.root / "index.json").read_text().replace('"it"', '"docker.io/a/it:1"')
    )
    assert load(f"oci:{layout.root}:docker.io/a/it:1", PLATFORM).digest == digest


def test_a_name_with_a_short_tag_is_found_as_podman_writes_it(tmp_path):
    docker_archive(tmp_path / "it.tar", FILES)
    rewritten = (tmp_path / "it.tar").read_bytes().replace(b'["it:latest"]', b'["l/it:late"]')
    (tmp_path / "it.tar").write_bytes(rewritten)
    assert load(f"docker-archive:{tmp_path}/it.tar:it:late", PLATFORM).unpacked_bytes == 15_000


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_the_holes_of_a_sparse_file_are_not_read(layout, tmp_path, form):
    size = 1 << 40
    with (tmp_path / "lastlog").open("wb") as file:
        file.write(b"begin")
        file.seek(size - 5)
        file.write(b"begin")
    tar = ["tar", "--sparse", f"--format={form}", "-C", str(tmp_path), "-cf", str(tmp_path / "it.tar"), "lastlog"]
    done = subprocess.run(tar, capture_output=True, check=False)
    if done.returncode or os.path.getsize(tmp_path / "it.tar") > 10_000_000:
        pytest.skip("no GNU tar, or a file system without holes")
    data = (tmp_path / "it.tar").read_bytes()
    config = put(layout, {"rootfs": {"diff_ids": [sha256(data)]}})
    layers = [blob(layout, gzip.compress(data))]
    layout.tag("it", put(layout, {"config": {"digest": config}, "layers": layers}))
    begin_s = time.process_time()
    found = load(f"oci:{layout.root}:it", PLATFORM)
    assert found.unpacked_bytes == size
    # A terabyte of zeros takes minutes.
    assert time.process_time() - begin_s < 30
