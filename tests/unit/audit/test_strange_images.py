"""Images as other programs write them, and as nobody should: a right total or one line that says what is wrong."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest
import size_audit
from audit.model import AuditError
from audit.sources import load

from tests.fakes.images import OCI, docker_archive, sha256, tar_of

PLATFORM = "linux/amd64"
FILES = [{"a": b"x" * 5000}, {"b": b"z" * 10_000}]


def index_of(layout, *descriptors):
    return layout.put(json.dumps({"mediaType": f"{OCI}.index.v1+json", "manifests": list(descriptors)}).encode())


def manifest_of(layout, tag):
    manifests = json.loads((layout.root / "index.json").read_text())["manifests"]
    return next(each["digest"] for each in manifests if each["annotations"]["org.opencontainers.image.ref.name"] == tag)


def add_tar(layout, tag, tar):
    """An image of one layer, of any bytes."""
    blob = gzip.compress(tar)
    config = layout.put(json.dumps({"rootfs": {"diff_ids": [sha256(tar)]}}).encode())
    layer = {"digest": layout.put(blob), "size": len(blob)}
    layout.tag(tag, layout.put(json.dumps({"config": {"digest": config}, "layers": [layer]}).encode()))
    return f"oci:{layout.root}:{tag}"


def for_architecture(digest, name, **more):
    return {"digest": digest, "platform": {"os": "linux", "architecture": name, **more}}


def test_an_index_in_an_index_is_looked_through(layout):
    layout.add("one", FILES)
    inner = index_of(layout, for_architecture(manifest_of(layout, "one"), "amd64"), for_architecture("x", "arm64"))
    attested = for_architecture(inner, "unknown")
    attested["platform"]["os"] = "unknown"
    layout.tag("nested", index_of(layout, attested, {"digest": inner, "mediaType": f"{OCI}.index.v1+json"}))
    assert load(f"oci:{layout.root}:nested", PLATFORM).unpacked_bytes == 15_000
    with pytest.raises(AuditError, match="no image for linux/riscv64"):
        load(f"oci:{layout.root}:nested", "linux/riscv64")


def test_a_variant_may_be_named(layout):
    layout.add("one", FILES)
    layout.add("two", FILES[:1])
    one = for_architecture(manifest_of(layout, "one"), "arm", variant="v6")
    two = for_architecture(manifest_of(layout, "two"), "arm", variant="v7")
    layout.tag("both", index_of(layout, one, two))
    assert load(f"oci:{layout.root}:both", "linux/arm/v7").unpacked_bytes == 5000
    assert load(f"oci:{layout.root}:both", "linux/arm").unpacked_bytes == 15_000


def test_a_layout_of_several_platforms_without_an_index_of_its_own(layout):
    layout.add("one", FILES)
    layout.add("two", FILES[:1])
    index = json.loads((layout.root / "index.json").read_text())
    for each, architecture in zip(index["manifests"], ("amd64", "arm64"), strict=True):
        each["platform"] = {"os": "linux", "architecture": architecture}
        del each["annotations"]
    (layout.root / "index.json").write_text(json.dumps(index))
    assert load(f"oci:{layout.root}", "linux/arm64").unpacked_bytes == 5000


def test_a_manifest_that_is_not_what_its_digest_says_is_refused(layout):
    name = layout.add("it", FILES)
    layout.blob(manifest_of(layout, "it")).write_text("{}")
    with pytest.raises(AuditError, match="not what its digest says"):
        load(name, PLATFORM)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(layers=3),
        lambda manifest: manifest["layers"][0].pop("digest"),
        lambda manifest: manifest["layers"][0].update(size=-1),
        lambda manifest: manifest["layers"][0].update(size="7"),
        lambda manifest: manifest["layers"][0].update(digest="md5:00"),
        lambda manifest: manifest.update(config=None),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(layout, change):
    name = layout.add("it", FILES, change=change)
    with pytest.raises(AuditError):
        load(name, PLATFORM)


def test_a_tar_that_is_damaged_in_the_middle_is_refused_though_every_digest_is_right(layout):
    spoilt = bytearray(tar_of({"a": b"x" * 5000, "b": b"y" * 5000}))
    begin = 512 + 5120
    spoilt[begin : begin + 200] = b"#" * 200
    with pytest.raises(AuditError, match="damaged"):
        load(add_tar(layout, "spoilt", bytes(spoilt)), PLATFORM)


def test_a_digest_may_be_of_sha512(layout):
    tar = tar_of(FILES[0])
    digest = f"sha512:{hashlib.sha512(tar).hexdigest()}"
    layout.blob(digest).parent.mkdir()
    layout.blob(digest).write_bytes(tar)
    config = layout.put(json.dumps({"rootfs": {"diff_ids": [digest]}}).encode())
    layer = {"digest": digest, "size": len(tar)}
    layout.tag("it", layout.put(json.dumps({"config": {"digest": config}, "layers": [layer]}).encode()))
    assert load(f"oci:{layout.root}:it", PLATFORM).compressed_bytes == len(tar)


def test_an_archives_packed_layers_are_as_large_as_they_are(tmp_path):
    """As `docker save` writes them from a store that keeps layers packed."""
    docker_archive(tmp_path / "bare.tar", FILES)
    packed = {}
    with tarfile.open(tmp_path / "bare.tar") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            packed[member.name] = gzip.compress(data) if member.name.endswith(".tar") else data
    (tmp_path / "packed.tar").write_bytes(tar_of(packed))
    image = load(f"docker-archive:{tmp_path}/packed.tar", PLATFORM)
    assert not any(layer.is_estimate for layer in image.layers)
    assert [layer.compressed_bytes for layer in image.layers] == [
        len(data) for name, data in packed.items() if name.endswith(".tar")
    ]


def test_one_of_several_images_of_an_archive_is_named(tmp_path):
    docker_archive(tmp_path / "it.tar", FILES)
    with tarfile.open(tmp_path / "it.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    (manifest,) = json.loads(members["manifest.json"])
    less = {**manifest, "RepoTags": ["less:1"], "Layers": manifest["Layers"][:1]}
    config = json.loads(members[manifest["Config"]])
    config["rootfs"]["diff_ids"] = config["rootfs"]["diff_ids"][:1]
    less["Config"] = "less.json"
    both = {**members, "less.json": json.dumps(config).encode(), "manifest.json": json.dumps([manifest, less]).encode()}
    (tmp_path / "both.tar").write_bytes(tar_of(both))
    assert load(f"docker-archive:{tmp_path}/both.tar:less:1", PLATFORM).unpacked_bytes == 5000
    with pytest.raises(AuditError, match="it:latest, less:1"):
        load(f"docker-archive:{tmp_path}/both.tar", PLATFORM)


def test_what_is_no_archive_is_told_in_one_line(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    with pytest.raises(AuditError, match=r"it is no tar$") as refused:
        load(f"docker-archive:{tmp_path}/junk", PLATFORM)
    assert "\n" not in str(refused.value)


def test_zstd_chunked_layers_need_not_unpack_to_the_very_tar(layout):
    """Some of its packers leave out the padding behind the last file."""

    def shorter(tar):
        return gzip.compress(tar.rstrip(b"\0") + bytes(1024), mtime=0)

    def chunked(manifest):
        for layer in manifest["layers"]:
            layer["annotations"] = {"io.containers.zstd-chunked.manifest-checksum": "sha256:00"}

    assert load(layout.add("chunked", FILES, pack=shorter, change=chunked), PLATFORM).unpacked_bytes == 15_000
    with pytest.raises(AuditError, match="unpacks to"):
        load(layout.add("plain", FILES, pack=shorter), PLATFORM)


def test_sizes_of_a_known_layer_are_not_taken_for_another_claim(layout):
    known = {}
    image = load(layout.add("it", FILES), PLATFORM, known)
    assert len(known) == 2
    assert load(layout.add("same", FILES), PLATFORM, known).layers == image.layers
    with pytest.raises(AuditError, match="the manifest says"):
        load(layout.add("liar", FILES, change=lambda m: m["layers"][0].update(size=1)), PLATFORM, known)


def test_names_of_any_bytes_are_shown(layout, capfdbinary):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        member = tarfile.TarInfo("caf\udce9/\x1b[31m\n.a")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    name = add_tar(layout, "it", out.getvalue())
    for form in ("table", "markdown", "html", "json"):
        assert size_audit.main([name, "--format", form]) == 0
        said = capfdbinary.readouterr().out
        assert b"caf" in said
        assert b"\x1b" not in said
