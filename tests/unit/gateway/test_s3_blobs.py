"""What a bucket does on bad days: objects of others, writes that cross, objects that vanish, bodies that break."""

import errno
import os
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

pytest.importorskip("aiobotocore")

import aiohttp
from botocore.exceptions import ClientError, NoCredentialsError

from fanlight.contract.names import digest_of
from fanlight.errors import NotFound, Unavailable
from services.gateway.adapters.s3_blobs import S3Blobs, described

OLD = datetime(2026, 1, 1, tzinfo=UTC)
DATA = b"data"
DIGEST = digest_of(DATA)


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def refused(code: str, words: str = "", status: int = 403) -> ClientError:
    answer = {"Error": {"Code": code, "Message": words}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "Call")


class Body:
    """An answer's; breaks before its end where it should."""

    def __init__(self, data: bytes, error: Exception | None) -> None:
        self._data, self._error = data, error

    async def __aenter__(self) -> "Body":
        return self

    async def __aexit__(self, *raised: object) -> None:
        pass

    async def read(self) -> bytes:
        return self._data

    async def iter_chunks(self, size_bytes: int) -> AsyncIterator[bytes]:
        yield self._data[:1]
        if self._error:
            raise self._error
        yield self._data[1:]


class Bucket:
    """Stands for the client of one bucket. `answers`: what gets are answered with, in turn; the last one stays."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.gets: list[ClientError | None] = [None]
        self.puts: ClientError | None = None
        self.breaks: Exception | None = None

    async def get_object(self, **call: str) -> dict[str, Any]:
        error = self.gets.pop(0) if len(self.gets) > 1 else self.gets[0]
        if error or call["Key"] not in self.objects:
            raise error or refused("NoSuchKey")
        data = self.objects[call["Key"]]
        content_range = f"bytes 0-{len(data) - 1}/{len(data)}"
        return {"Body": Body(data, self.breaks), "ContentRange": content_range, "LastModified": datetime.now(UTC)}

    async def put_object(self, **call: Any) -> None:
        if self.puts:
            raise self.puts

    async def delete_object(self, **call: str) -> None:
        del self.objects[call["Key"]]

    def get_paginator(self, name: str) -> "Bucket":
        return self

    async def paginate(self, **call: str) -> AsyncIterator[dict[str, Any]]:
        yield {"Contents": [{"Key": key, "LastModified": OLD} for key in list(self.objects)]}


def key_of(digest: str) -> str:
    name = digest.removeprefix("sha256:")
    return f"default/{name[:2]}/{name[2:]}"


def store_of(bucket: Bucket) -> S3Blobs:
    return S3Blobs(bucket, bucket="blobs", prefix="", blob_limit_bytes=1_000)


async def test_what_others_keep_in_the_bucket_is_left_alone_and_stops_no_sweep() -> None:
    others = ["a.txt", "photos/2026/cat.png", f"Default/{key_of(DIGEST)[8:]}", f"deep/{key_of(DIGEST)}"]
    bucket = Bucket({**dict.fromkeys(others, b"x"), key_of(DIGEST): DATA})
    swept = await store_of(bucket).sweep(
        older_than_s=1.0, now_s=datetime.now(UTC).timestamp(), keep=lambda scope, digest: False
    )
    assert swept == 1
    assert sorted(bucket.objects) == sorted(others)


async def test_a_write_that_crosses_another_counts_only_if_that_other_arrived() -> None:
    bucket = Bucket({})
    bucket.puts = refused("ConditionalRequestConflict")
    with pytest.raises(Unavailable):
        await store_of(bucket).write("default", once(DATA))
    bucket.objects[key_of(DIGEST)] = DATA
    assert (await store_of(bucket).write("default", once(DATA))).digest == DIGEST


async def test_a_blob_that_vanishes_between_two_looks_is_not_found() -> None:
    bucket = Bucket({key_of(DIGEST): DATA})
    bucket.gets = [None, refused("NoSuchKey")]
    with pytest.raises(NotFound):
        await anext(store_of(bucket).read("default", DIGEST))


async def test_a_body_that_breaks_off_is_a_store_that_is_away() -> None:
    bucket = Bucket({key_of(DIGEST): DATA})
    bucket.breaks = aiohttp.ClientPayloadError("cut")
    with pytest.raises(Unavailable):
        [chunk async for chunk in store_of(bucket).read("default", DIGEST)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refused("InvalidAccessKeyId", "The key does not\nexist."), "InvalidAccessKeyId, 403, The key does not exist."),
        (refused("SlowDown", "Please reduce your rate.", 503), "SlowDown, 503, Please reduce your rate."),
        (refused("XMinioStorageFull", "Storage is full.", 507), "XMinioStorageFull, 507, Storage is full."),
        (refused("403"), "403"),
    ],
)
async def test_an_error_of_the_bucket_has_its_code(error: ClientError, words: str) -> None:
    bucket = Bucket({})
    bucket.gets, bucket.puts = [error], error
    for call in (store_of(bucket).write("default", once(DATA)), store_of(bucket).stat("default", DIGEST)):
        with pytest.raises(Unavailable, match=f"the blob store refuses: {words}$") as caught:
            await call
        assert caught.value.retry_after_s


def test_missing_credentials_are_named() -> None:
    assert described(NoCredentialsError()) == "NoCredentialsError: Unable to locate credentials"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
async def test_a_fault_of_the_temporary_folder_is_not_the_buckets(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", fails)
    store = S3Blobs(Bucket({}), bucket="blobs", prefix="", blob_limit_bytes=10_000_000)
    with pytest.raises(Unavailable, match="TMPDIR") as caught:
        await store.write("default", once(bytes(2_000_000)))
    assert caught.value.retry_after_s == 60.0
