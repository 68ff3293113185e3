"""Faults of the gateway's own disk: 503 with the folder and a delay, never 500, never a traceback."""

import errno
import os
import tempfile

import httpx
import pytest

from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.gateway import FakeGateway
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.small_disks import fill, tmpfs

CODES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE]
PICTURE = b"\xff\xd8\xff" + bytes(3_000_000)
FORM = {"photo": ("p.jpg", PICTURE), "job": (None, '{"annotation": {"image": {"url": "part:photo"}}}')}


@pytest.fixture
def options() -> HttpOptions:
    return HttpOptions()


def check(response: httpx.Response, words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["reason"]) == (503, "UNAVAILABLE")
    assert words in error["message"]
    assert int(response.headers["retry-after"]) > 0


async def test_a_full_folder_for_temporary_files_is_named(client, monkeypatch, tmp_path):
    with tmpfs(tmp_path / "tmp", "1m") as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        for path in ("/v1/jobs", "/v1/blobs", "/v1/annotate/canny"):
            check(await client.post(path, files=FORM), f"{folder} (TMPDIR): the disk is full")
        fill(folder)
        check(await client.post("/v1/jobs", files=FORM), f"{folder} (TMPDIR): the disk is full")
        # What needs no temporary file goes on.
        assert (await client.post("/v1/blobs", content=PICTURE)).status_code == 201


@pytest.mark.parametrize("code", CODES)
async def test_no_temporary_file_is_a_fault_of_the_machine(client, monkeypatch, code):
    def fails(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", fails)
    check(await client.post("/v1/jobs", files=FORM), "(TMPDIR): ")


@pytest.mark.parametrize("code", CODES)
async def test_a_fault_of_a_disk_anywhere_names_the_folder(monkeypatch, code):
    blobs = MemoryBlobs()

    async def fails(*_args, **_options):
        raise OSError(code, os.strerror(code), "/some/folder/file")

    monkeypatch.setattr(blobs, "write", fails)
    app = http_app(FakeGateway(), blobs, HttpOptions())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        check(await client.post("/v1/blobs", content=b"x"), "/some/folder")


async def test_another_error_is_still_one_of_ours(monkeypatch):
    blobs = MemoryBlobs()

    async def fails(*_args, **_options):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/some/folder/file")

    monkeypatch.setattr(blobs, "write", fails)
    app = http_app(FakeGateway(), blobs, HttpOptions())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        response = await client.post("/v1/blobs", content=b"x")
    assert (response.status_code, response.json()["error"]["reason"]) == (500, "INTERNAL")
