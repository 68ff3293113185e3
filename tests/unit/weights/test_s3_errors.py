"""What an S3 server, or the way to it, says when it does not do."""

import asyncio

import pytest

from fanlight.errors import FanlightError, NotFound
from services.kernel.network import s3_connection
from services.weights.errors import SourceFailed, TokenRefused
from services.weights.references.references import S3Ref
from services.weights.transfer import s3

pytest.importorskip("aiobotocore")
FOLDER = S3Ref(bucket="weights", key="a/")


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


async def test_a_server_that_cannot_be_reached_is_no_refused_token():
    with pytest.raises(SourceFailed, match=r"s3://weights/a/.*127\.0\.0\.1") as caught:
        await s3.listing(FOLDER, endpoint="http://127.0.0.1:9", region="us-east-1", limit=1)
    assert not caught.value.is_request_fault


@pytest.mark.parametrize(
    ("code", "kind"), [("NoSuchBucket", NotFound), ("AccessDenied", TokenRefused), ("SlowDown", SourceFailed)]
)
async def test_error_codes_of_the_server_become_our_errors(code, kind):
    from botocore.exceptions import ClientError

    with pytest.raises(kind, match=f"s3://weights/a/.*{code}"):
        async with s3._client(FOLDER, "http://127.0.0.1:9", "us-east-1"):
            raise ClientError({"Error": {"Code": code}}, "ListObjectsV2")


@pytest.mark.parametrize(
    ("code", "more", "advice"),
    [
        (
            "PermanentRedirect",
            {"Region": "eu-west-1"},
            "the region eu-west-1; set FANLIGHT_WEIGHTS_S3_REGION=eu-west-1",
        ),
        ("AuthorizationHeaderMalformed", {"Region": "us-west-2"}, "FANLIGHT_WEIGHTS_S3_REGION=us-west-2"),
        ("RequestTimeTooSkewed", {}, "clock"),
        ("ExpiredToken", {}, "credentials"),
    ],
)
async def test_an_error_of_the_server_says_what_to_do(code, more, advice):
    from botocore.exceptions import ClientError

    with pytest.raises(FanlightError, match=f"s3://weights/a/.*{code}.*{advice}"):
        async with s3._client(FOLDER, "http://127.0.0.1:9", "us-east-1"):
            raise ClientError({"Error": {"Code": code, **more}}, "ListObjectsV2")


@pytest.mark.parametrize(
    ("endpoint", "is_amazon"),
    [
        ("", True),
        ("https://s3.eu-west-1.amazonaws.com", True),
        ("https://s3.cn-north-1.amazonaws.com.cn", True),
        ("http://127.0.0.1:9000", False),
        ("https://storage.googleapis.com", False),
        ("https://amazonaws.com.example.org", False),
        ("https://notamazonaws.com", False),
    ],
)
def test_only_amazon_gets_checksums_that_it_does_not_require(endpoint, is_amazon):
    config, _ = s3_connection(endpoint)
    names = ("request_checksum_calculation", "response_checksum_validation")
    assert [config.get(name) for name in names] == ([None] * 2 if is_amazon else ["when_required"] * 2)


async def test_an_upload_to_another_server_has_no_checksum_that_it_may_refuse(tmp_path):
    seen = []

    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        seen.append(head)
        length = next((int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:")), 0)
        if "expect: 100-continue" in head:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reader.readexactly(length)
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: "1"\r\nConnection: close\r\n\r\n')
        await writer.drain()
        writer.close()

    file = tmp_path / "m"
    file.write_bytes(b"1234")
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await s3.upload(S3Ref(bucket="b", key="m"), file, endpoint=f"http://127.0.0.1:{port}", region="us-east-1")
    assert len(seen) == 1
    assert "checksum" not in seen[0]
    assert "aws-chunked" not in seen[0]
