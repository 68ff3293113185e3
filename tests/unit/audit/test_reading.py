"""Images are read whole or refused: from a layout, an archive, a registry; damaged ones name what is wrong."""

import functools
import gzip
import http.server
import json
import shutil
import subprocess
import threading

import pytest
from audit.model import AuditError
from audit.sources import load

from tests.fakes.images import docker_archive

PLATFORM = "linux/amd64"
FILES = [{"a": b"x" * 5000, "b": b"y" * 300}, {"c": b"z" * 10_000}]


def test_totals_are_those_of_the_blobs_and_of_the_files(layout):
    image = load(layout.add("it", FILES), PLATFORM)

    blobs = [layout.blob(layer.digest).stat().st_size for layer in image.layers]
    assert [layer.compressed_bytes for layer in image.layers] == blobs
    assert (image.compressed_bytes, image.unpacked_bytes) == (sum(blobs), 15_300)


def test_a_docker_archive_has_bare_tars_and_its_compressed_size_is_what_gzip_makes_of_them(tmp_path, layout):
    archive = load(docker_archive(tmp_path / "it.tar", FILES), PLATFORM)
    oci = load(layout.add("it", FILES, pack=lambda tar: gzip.compress(tar, 3, mtime=0)), PLATFORM)

    assert archive.unpacked_bytes == 15_300
    assert all(layer.is_estimate for layer in archive.layers)
    assert archive.compressed_bytes == pytest.approx(oci.compressed_bytes, rel=0.01)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="packs a layer with zstd, which is not here")
def test_a_zstd_layer_is_read(layout):
    def pack(tar):
        return subprocess.run(["zstd", "-c"], input=tar, capture_output=True, check=True).stdout

    assert load(layout.add("it", FILES, pack=pack), PLATFORM).unpacked_bytes == 15_300


def test_a_layer_of_a_hundred_thousand_files_is_counted_right(layout):
    image = load(layout.add("it", [{f"d{n % 100}/{n}": b"1234567" for n in range(100_000)}]), PLATFORM)

    assert len(image.layers[0].entries) == 100_000
    assert image.unpacked_bytes == 700_000


def test_the_right_platform_is_chosen_from_a_list(layout):
    layout.add("one", FILES)
    layout.add("two", FILES[:1])
    one, two = (each["digest"] for each in json.loads((layout.root / "index.json").read_text())["manifests"])
    index = [
        {"digest": one, "platform": {"os": "linux", "architecture": "arm64"}},
        {"digest": two, "platform": {"os": "linux", "architecture": "amd64"}},
    ]
    layout.tag("both", layout.put(json.dumps({"manifests": index}).encode()))

    assert load(f"oci:{layout.root}:both", PLATFORM).unpacked_bytes == 5300
    with pytest.raises(AuditError, match="no image for linux/s390x; there are linux/amd64, linux/arm64"):
        load(f"oci:{layout.root}:both", "linux/s390x")


def refused(layout, match, **options):
    name = layout.add("bad", FILES, **options)
    with pytest.raises(AuditError, match=match):
        load(name, PLATFORM)


def test_a_truncated_layer_is_refused(layout):
    refused(layout, "damaged or cut short", pack=lambda tar: gzip.compress(tar)[:-20])


def test_a_layer_with_a_wrong_digest_is_refused(layout):
    image = load(layout.add("it", FILES), PLATFORM)
    layout.blob(image.layers[0].digest).write_bytes(gzip.compress(b"\0" * 10_240))

    with pytest.raises(AuditError, match="the manifest says"):
        load(f"oci:{layout.root}:it", PLATFORM)


def test_a_layer_of_a_wrong_size_is_refused(layout):
    refused(layout, "the manifest says", change=lambda manifest: manifest["layers"][0].update(size=7))


def test_a_foreign_layer_is_refused_by_name(layout):
    foreign = {"digest": f"sha256:{'0' * 64}", "urls": ["https://example.invalid/layer"]}

    refused(layout, "foreign", change=lambda manifest: manifest["layers"][0].update(foreign))


def test_a_missing_layer_is_refused(layout):
    refused(layout, "missing", change=lambda manifest: manifest["layers"][0].update(digest=f"sha256:{'0' * 64}"))


def test_a_digest_that_climbs_out_of_the_layout_is_refused(layout):
    refused(layout, "no digest", change=lambda manifest: manifest["layers"][0].update(digest="sha256:../../index.json"))


def test_a_truncated_archive_is_refused(tmp_path):
    docker_archive(tmp_path / "it.tar", FILES)
    whole = (tmp_path / "it.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(AuditError, match="no whole docker archive"):
        load(f"docker-archive:{tmp_path}/cut.tar", PLATFORM)


@pytest.mark.parametrize(
    "name", ["", "nonsense", "oci:", "oci:/nowhere", "docker://only-a-host", "docker-archive:/nowhere"]
)
def test_what_is_no_image_is_refused(name):
    with pytest.raises(AuditError):
        load(name, PLATFORM)


class RegistryHandler(http.server.BaseHTTPRequestHandler):
    """The part of the v2 API that the audit uses, over an OCI layout, behind a bearer token."""

    def __init__(self, layout, *arguments):
        self.layout = layout
        super().__init__(*arguments)

    def do_GET(self):
        if self.path.startswith("/token"):
            return self.answer(200, b'{"token": "t"}')
        if self.headers.get("Authorization") != "Bearer t":
            realm = f"http://{self.headers['Host']}/token"
            return self.answer(401, b"", ("WWW-Authenticate", f'Bearer realm="{realm}",service="s",scope="pull"'))
        kind, reference = self.path.rsplit("/", 2)[1:]
        digest = reference
        if kind == "manifests" and reference == "latest":
            digest = json.loads((self.layout.root / "index.json").read_text())["manifests"][0]["digest"]
        path = self.layout.blob(digest)
        if not path.exists():
            return self.answer(404, b"")
        return self.answer(200, path.read_bytes(), ("Docker-Content-Digest", digest))

    def answer(self, status, body, *headers):
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_registry_is_read_like_the_layout_behind_it(layout):
    expected = load(layout.add("it", FILES), PLATFORM)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(RegistryHandler, layout))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        image = load(f"docker://127.0.0.1:{server.server_port}/team/it:latest", PLATFORM)
        pinned = f"docker://127.0.0.1:{server.server_port}/team/it:1.0@{image.digest}"
        assert load(pinned, PLATFORM).layers == image.layers
        with pytest.raises(AuditError):
            load(f"docker://127.0.0.1:{server.server_port}/team/it:other", PLATFORM)
    finally:
        server.shutdown()
        server.server_close()

    assert (image.digest, image.layers) == (expected.digest, expected.layers)
