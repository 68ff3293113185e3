"""/v1/blobs"""

from collections.abc import AsyncIterator

import httpx
import pytest

from fanlight.contract.names import digest_of
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.gateway import FakeGateway
from tests.fakes.memory_blobs import MemoryBlobs

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
ABSENT = digest_of(b"absent")
Client = httpx.AsyncClient


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["reason"], error.get("field", "")


async def test_raw_bytes_become_a_blob_that_can_be_fetched(client: Client) -> None:
    written = await client.post("/v1/blobs", content=PNG)
    assert written.status_code == 201
    assert written.json() == {
        "scope": "default",
        "digest": digest_of(PNG),
        "size_bytes": str(len(PNG)),
        "media_type": "image/png",
    }
    fetched = await client.get(written.headers["location"])
    assert fetched.content == PNG
    assert fetched.headers["content-type"] == "image/png"
    assert fetched.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in fetched.headers["cache-control"]
    assert fetched.headers["etag"] == f'"{digest_of(PNG)}"'


@pytest.mark.parametrize("name", ["photo.png", "", None])
async def test_a_form_with_one_file_becomes_a_blob(client: Client, name: str | None) -> None:
    written = await client.post("/v1/blobs", files={"anything": (name, PNG)})
    assert written.json()["digest"] == digest_of(PNG)


async def test_a_stream_of_unknown_length_becomes_a_blob(client: Client) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for byte in PNG:
            yield bytes([byte])

    assert (await client.post("/v1/blobs", content=chunks())).json()["digest"] == digest_of(PNG)


async def test_bytes_that_are_no_image_have_no_telling_type(client: Client, blobs: MemoryBlobs) -> None:
    info = blobs.put(b"<html><script>alert(1)</script>")
    fetched = await client.get(f"/v1/blobs/{info.digest}")
    assert fetched.headers["content-type"] == "application/octet-stream"


async def test_a_part_without_a_file_name_is_of_no_concern_beside_a_file(client: Client) -> None:
    written = await client.post("/v1/blobs", files={"note": (None, "a note"), "photo": ("p.png", PNG)})
    assert written.json()["digest"] == digest_of(PNG)


@pytest.mark.parametrize("files", [{"a": (None, PNG), "b": (None, PNG)}, {"a": ("a.png", PNG), "b": ("b.png", PNG)}])
async def test_a_form_with_no_file_or_several_is_refused(client: Client, files: dict[str, tuple[str, bytes]]) -> None:
    assert error_of(await client.post("/v1/blobs", files=files)) == (400, "INVALID_FIELD", "body")


async def test_the_right_digest_is_taken_and_a_wrong_one_refused(client: Client, blobs: MemoryBlobs) -> None:
    assert error_of(await client.post("/v1/blobs", params={"digest": ABSENT}, content=PNG)) == (
        400,
        "INVALID_FIELD",
        "digest",
    )
    assert blobs.used_bytes == 0
    assert (await client.post("/v1/blobs", params={"digest": digest_of(PNG)}, content=PNG)).status_code == 201


async def test_an_empty_body_is_refused(client: Client) -> None:
    assert error_of(await client.post("/v1/blobs", content=b"")) == (400, "INVALID_FIELD", "body")


async def test_an_announced_body_above_the_limit_is_refused(client: Client) -> None:
    response = await client.post("/v1/blobs", content=PNG, headers={"content-length": "200001"})
    assert error_of(response) == (413, "TOO_LARGE", "body")
    assert response.headers["connection"] == "close"


async def test_a_body_that_grows_above_the_limit_is_refused(client: Client, blobs: MemoryBlobs) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield bytes(50_000)

    assert error_of(await client.post("/v1/blobs", content=chunks())) == (413, "TOO_LARGE", "body")
    assert blobs.used_bytes == 0


@pytest.mark.parametrize(
    ("header", "wanted", "content_range"),
    [
        ("bytes=1-3", b"PNG", "bytes 1-3/264"),
        ("bytes=-2", b"\xfe\xff", "bytes 262-263/264"),
        ("bytes=262-", b"\xfe\xff", "bytes 262-263/264"),
    ],
)
async def test_a_part_is_sent(
    client: Client, blobs: MemoryBlobs, header: str, wanted: bytes, content_range: str
) -> None:
    response = await client.get(f"/v1/blobs/{blobs.put(PNG).digest}", headers={"range": header})
    assert (response.status_code, response.content) == (206, wanted)
    assert response.headers["content-range"] == content_range


async def test_a_part_past_the_end_is_refused_with_the_size(client: Client, blobs: MemoryBlobs) -> None:
    response = await client.get(f"/v1/blobs/{blobs.put(PNG).digest}", headers={"range": "bytes=264-"})
    assert error_of(response) == (416, "OUT_OF_RANGE", "Range")
    assert response.headers["content-range"] == "bytes */264"


async def test_a_part_of_what_changed_is_all_of_it(client: Client, blobs: MemoryBlobs) -> None:
    headers = {"range": "bytes=1-3", "if-range": '"another"'}
    response = await client.get(f"/v1/blobs/{blobs.put(PNG).digest}", headers=headers)
    assert (response.status_code, response.content) == (200, PNG)


@pytest.mark.parametrize("tag", ['"{}"', 'W/"{}"', '"x", "{}"', "*"])
async def test_a_cached_blob_is_not_sent_again(client: Client, blobs: MemoryBlobs, tag: str) -> None:
    digest = blobs.put(PNG).digest
    response = await client.get(f"/v1/blobs/{digest}", headers={"if-none-match": tag.format(digest)})
    assert (response.status_code, response.content) == (304, b"")


async def test_head_describes_the_blob_without_its_bytes(client: Client, blobs: MemoryBlobs) -> None:
    response = await client.head(f"/v1/blobs/{blobs.put(PNG).digest}")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(PNG))
    assert response.headers["content-type"] == "image/png"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_blob_that_is_not_there_is_not_found(client: Client, method: str) -> None:
    assert (await client.request(method, f"/v1/blobs/{ABSENT}")).status_code == 404


@pytest.mark.parametrize("digest", ["abc", "sha256:..%2F..", "md5:" + "0" * 32, "sha256:" + "Z" * 64])
async def test_what_is_no_digest_is_refused(client: Client, digest: str) -> None:
    assert (await client.get(f"/v1/blobs/{digest}")).status_code in (400, 404)


async def test_scopes_do_not_see_each_other(client: Client) -> None:
    digest = (await client.post("/v1/blobs", params={"scope": "one"}, content=PNG)).json()["digest"]
    assert (await client.get(f"/v1/blobs/{digest}", params={"scope": "one"})).status_code == 200
    assert (await client.get(f"/v1/blobs/{digest}")).status_code == 404
    assert error_of(await client.get(f"/v1/blobs/{digest}", params={"scope": "../up"})) == (
        400,
        "INVALID_FIELD",
        "scope",
    )


async def test_an_unknown_query_parameter_is_named(client: Client) -> None:
    assert error_of(await client.post("/v1/blobs", params={"digset": "x"}, content=PNG)) == (
        400,
        "INVALID_FIELD",
        "digset",
    )


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary="]
)
async def test_a_garbage_form_is_refused(client: Client, content_type: str) -> None:
    response = await client.post("/v1/blobs", content=b"\x00garbage\xff" * 100, headers={"content-type": content_type})
    assert error_of(response) == (400, "INVALID_FIELD", "body")


async def test_a_form_cut_in_the_middle_of_its_file_is_refused(client: Client, blobs: MemoryBlobs) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    response = await client.post(
        "/v1/blobs", content=head + PNG, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert error_of(response) == (400, "INVALID_FIELD", "body")
    assert blobs.used_bytes == 0


class BucketBlobs(MemoryBlobs):
    """Gives bytes past the gateway."""

    async def prepare_upload(self, scope: str, digest: str, size_bytes: int) -> None:
        return None

    async def prepare_read(self, scope: str, digest: str) -> str:
        return f"https://bucket.example/{scope}/{digest}"


async def test_who_asks_for_it_is_sent_to_the_bucket(gateway: FakeGateway, options: HttpOptions) -> None:
    blobs = BucketBlobs()
    info = blobs.put(PNG)
    transport = httpx.ASGITransport(http_app(gateway, blobs, options))
    async with Client(transport=transport, base_url="http://gateway") as client:
        sent = await client.get(f"/v1/blobs/{info.digest}?redirect=true")
        assert (sent.status_code, sent.headers["location"]) == (307, f"https://bucket.example/default/{info.digest}")
        assert sent.headers["cache-control"] == "no-store"
        assert (await client.head(f"/v1/blobs/{info.digest}?redirect=true")).status_code == 200
        assert (await client.get(f"/v1/blobs/{info.digest}")).content == PNG


async def test_where_there_is_no_bucket_the_bytes_come_all_the_same(client: Client, blobs: MemoryBlobs) -> None:
    info = blobs.put(PNG)
    assert (await client.get(f"/v1/blobs/{info.digest}?redirect=true")).content == PNG
