"""What an S3 server, or the way to it, says when it does not do."""

import pytest

from fanlight.errors import NotFound
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
