"""S3: presigned addresses, downloaded like any other source with ranges, retries and checks; listing and uploading.

Credentials come from where AWS tools find them: environment, profile, or the machine's role.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fanlight.errors import FailedPrecondition, FanlightError, NotFound
from fanlight.proxies import BadProxy
from services.kernel.network import s3_connection
from services.weights.errors import SourceFailed, TokenRefused
from services.weights.references.references import S3Ref

# Longer than a sensible download; a download that outlives it gets a new address and continues.
EXPIRES_S = 12 * 3600
PART_BYTES = 16 * 1024 * 1024
MAX_PARTS = 10_000
_OTHER_REGION = ("301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_MISSING = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
_REFUSED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
_CLOCK = "RequestTimeTooSkewed"


@contextlib.asynccontextmanager
async def _client(reference: S3Ref, endpoint: str, region: str) -> AsyncIterator[Any]:
    try:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as NoConnection
    except ImportError as error:
        raise FailedPrecondition(f"{reference} needs aiobotocore: pip install 'fanlight[s3]'") from error
    try:
        network, trust = s3_connection(endpoint)
    except BadProxy as error:
        raise SourceFailed(f"{reference}: {error}", field="reference") from error
    # Path style: a bucket name need not be a valid host name.
    config = AioConfig(signature_version="s3v4", s3={"addressing_style": "path"} if endpoint else {}, **network)
    try:
        async with get_session().create_client(
            "s3", endpoint_url=endpoint or None, region_name=region or None, config=config, **trust
        ) as client:
            yield client
    except ClientError as error:
        raise _refusal(reference, error) from error
    except (NoConnection, HTTPClientError) as error:
        raise SourceFailed(f"{reference}: {error}", field="reference") from error
    except BotoCoreError as error:
        raise TokenRefused(f"{reference}: {error}", field="reference") from error


def _refusal(reference: S3Ref, error: Any) -> FanlightError:
    """Our error for a `ClientError`, with AWS's code and what to do."""
    code = _code(error)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region", "")
    told = f"{reference}: the S3 server answers {code}"
    if code in _MISSING:
        return NotFound(told, field="reference")
    if code in _REFUSED:
        return TokenRefused(f"{told}: check the AWS credentials of this machine", field="reference")
    if code == _CLOCK:
        told += ": set this machine's clock"
    elif code in _OTHER_REGION and region:
        told += f": the bucket is in the region {region}; set FANLIGHT_WEIGHTS_S3_REGION={region}"
    return SourceFailed(told, field="reference")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


async def presigned(reference: S3Ref, *, endpoint: str, region: str) -> str:
    """A URL to read the object from without credentials for EXPIRES_S. TokenRefused without keys."""
    async with _client(reference, endpoint, region) as client:
        parameters = {"Bucket": reference.bucket, "Key": reference.key}
        address: str = await client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=EXPIRES_S)
        return address


async def listing(reference: S3Ref, *, endpoint: str, region: str, limit: int) -> list[tuple[str, int, str]]:
    """Key, size and ETag of the objects below the reference's key, at most `limit` + 1."""
    prefix, found = f"{reference.key.rstrip('/')}/", []
    async with _client(reference, endpoint, region) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=reference.bucket, Prefix=prefix)
        async for page in pages:
            found += [(row["Key"], int(row["Size"]), str(row.get("ETag", ""))) for row in page.get("Contents", ())]
            if len(found) > limit:
                break
    return found[: limit + 1]


async def read(reference: S3Ref, *, endpoint: str, region: str) -> bytes | None:
    """The object's bytes; None if there is no such object."""
    from botocore.exceptions import ClientError

    async with _client(reference, endpoint, region) as client:
        try:
            answer = await client.get_object(Bucket=reference.bucket, Key=reference.key)
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise
        async with answer["Body"] as stream:
            body: bytes = await stream.read()
            return body


async def size_of(reference: S3Ref, *, endpoint: str, region: str) -> int | None:
    from botocore.exceptions import ClientError

    async with _client(reference, endpoint, region) as client:
        try:
            return int((await client.head_object(Bucket=reference.bucket, Key=reference.key))["ContentLength"])
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise


async def upload(reference: S3Ref, path: Path, *, endpoint: str, region: str) -> None:
    """The file becomes the object: in one call, or in parts where it is large. It appears whole or not at all."""
    size = (await asyncio.to_thread(path.stat)).st_size
    place = {"Bucket": reference.bucket, "Key": reference.key}
    async with _client(reference, endpoint, region) as client:
        if size <= PART_BYTES:
            await client.put_object(**place, Body=await asyncio.to_thread(path.read_bytes))
            return
        upload_id = (await client.create_multipart_upload(**place))["UploadId"]
        try:
            parts = await _send_parts(client, place, upload_id, path, max(PART_BYTES, -(-size // MAX_PARTS)))
            await client.complete_multipart_upload(**place, UploadId=upload_id, MultipartUpload={"Parts": parts})
        except BaseException:
            await client.abort_multipart_upload(**place, UploadId=upload_id)
            raise


async def _send_parts(
    client: Any, place: dict[str, str], upload_id: str, path: Path, step: int
) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    with await asyncio.to_thread(path.open, "rb") as file:
        while data := await asyncio.to_thread(file.read, step):
            number = len(parts) + 1
            answer = await client.upload_part(**place, UploadId=upload_id, PartNumber=number, Body=data)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    return parts
