"""The BlobStore in an S3 bucket: objects by digest, shared by all gateways. Its size is bounded by the bucket's owner.

An object is written once: every write says "only if it does not exist". Nodes without credentials upload to addresses
that are signed for one digest and size.
"""

import base64
import hashlib
import re
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError

from fanlight.contract.names import named, parse_digest, parse_scope
from fanlight.errors import NotFound, OutOfRange, TooLarge, Unavailable
from fanlight.proxies import BadProxy
from services.gateway.adapters.blob_files import StoredTail, check_announced
from services.gateway.adapters.disk_blobs import CachedBlob
from services.gateway.adapters.seal_format import FOOTER_BYTES, BlobSealer, count_seals
from services.gateway.ports import BlobSeals, Erased, Upload
from services.kernel.blobs import BlobInfo, Keep, media_type_of
from services.kernel.config import SettingsError
from services.kernel.disks import is_of_disk, no_temporary_file, unavailable
from services.kernel.logs import get_logger
from services.kernel.network import s3_connection

log = get_logger()

RETRY_AFTER_S = 2.0
# Characters of the server's words.
WORDS_QUOTED = 200

ABSENT = ("404", "NoSuchKey", "NotFound")
PRESENT = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
BEYOND = ("InvalidRange", "416")


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def described(error: ClientError | BotoCoreError) -> str:
    """The server's code, its status where they differ, and its words; never an address or a key of the request."""
    if isinstance(error, BotoCoreError):
        return f"{type(error).__name__}: {' '.join(str(error).split())[:WORDS_QUOTED]}"
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    words = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:WORDS_QUOTED]
    return ", ".join(dict.fromkeys(each for each in (code_of(error), status, words) if each))


@contextmanager
def our_errors() -> Iterator[None]:
    """ABSENT, PRESENT and BEYOND pass to the caller; every other error becomes Unavailable."""
    try:
        yield
    except ClientError as error:
        if code_of(error) in (*ABSENT, *PRESENT, *BEYOND):
            raise
        raise Unavailable(f"the blob store refuses: {described(error)}", retry_after_s=RETRY_AFTER_S) from error
    except OSError as error:
        if is_of_disk(error):
            raise unavailable(error) from error
        raise Unavailable("the blob store does not answer", retry_after_s=RETRY_AFTER_S) from error
    except (BotoCoreError, aiohttp.ClientError, TimeoutError) as error:
        raise Unavailable("the blob store does not answer", retry_after_s=RETRY_AFTER_S) from error


READ_CHUNK_BYTES = 256 * 1024
# How much of an incoming blob is buffered in memory; more goes to a temporary file.
SPOOL_BYTES = 1024 * 1024
HEAD_BYTES = 16
UNKNOWN_MEDIA_TYPE = "application/octet-stream"
UPLOAD_S = 900
READ_S = 900
# S3 has no time of last use: a use copies the object onto itself, at most this often, to reset its age.
TOUCH_EVERY_S = 86_400.0
CALL_S = 20

_BLOB = re.compile(r"([a-z0-9][a-z0-9-]{0,62})/([0-9a-f]{2})/([0-9a-f]{62})")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    info: BlobInfo
    age_s: float


class S3Blobs:
    """Made by `open_s3_blobs`. Passes the suite in tests/contract, except for the budget: it has no budget."""

    def __init__(self, client: Any, *, bucket: str, prefix: str, blob_limit_bytes: int) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._blob_limit_bytes = blob_limit_bytes

    async def write(
        self,
        scope: str,
        chunks: AsyncIterable[bytes],
        *,
        digest: str = "",
        size_bytes: int = 0,
        settled: bool = False,
        sealer: BlobSealer | None = None,
    ) -> BlobInfo:
        """`sealer`: what leaves this process, also to a temporary file, is sealed."""
        if size_bytes > self._blob_limit_bytes:
            raise TooLarge(f"a blob has at most {self._blob_limit_bytes} bytes", field="size_bytes")
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            if sealer is None:
                info = await self._spool(scope, chunks, spool)
            else:
                info = await self._spool_sealed(scope, chunks, spool, sealer)
            check_announced(info, digest=digest, size_bytes=size_bytes)
            if sealer is None:
                await self._put(info, spool)
            else:
                await self._put_sealed(info, spool, sealer)
        return info

    async def _spool_sealed(
        self, scope: str, chunks: AsyncIterable[bytes], spool: IO[bytes], sealer: BlobSealer
    ) -> BlobInfo:
        size_bytes = 0
        async for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > self._blob_limit_bytes:
                raise TooLarge(f"a blob has at most {self._blob_limit_bytes} bytes")
            _write_all(spool, sealer.take(chunk))
        info, last = sealer.finish(scope)
        _write_all(spool, last)
        spool.seek(0)
        return info

    async def _put_sealed(self, info: BlobInfo, body: IO[bytes], sealer: BlobSealer) -> None:
        """Replaces an object in clear, and one that cannot be opened."""
        stored_bytes, checksum = _sha256_of(body)
        key = self._key(info.scope, info.digest)
        for condition in ({"IfNoneMatch": "*"}, {}):
            body.seek(0)
            try:
                with our_errors():
                    await self._client.put_object(
                        Bucket=self._bucket,
                        Key=key,
                        Body=body,
                        ContentLength=stored_bytes,
                        ContentType=UNKNOWN_MEDIA_TYPE,
                        ChecksumSHA256=checksum,
                        **condition,
                    )
                return
            except ClientError as error:
                if code_of(error) not in PRESENT:
                    raise
            tail = await self.tail(info.scope, info.digest)
            if tail is not None and sealer.keeps(info.scope, info.digest, tail.data, tail.stored_bytes):
                return
        message = "another write of the same blob interfered and failed; write it again"
        raise Unavailable(message, retry_after_s=RETRY_AFTER_S)

    async def _spool(self, scope: str, chunks: AsyncIterable[bytes], spool: IO[bytes]) -> BlobInfo:
        sha256, size_bytes, head = hashlib.sha256(), 0, b""
        async for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > self._blob_limit_bytes:
                raise TooLarge(f"a blob has at most {self._blob_limit_bytes} bytes")
            sha256.update(chunk)
            head = (head + chunk[:HEAD_BYTES])[:HEAD_BYTES]
            try:
                spool.write(chunk)
            except OSError as error:
                raise no_temporary_file(error) from error
        spool.seek(0)
        return BlobInfo(
            scope=scope, digest=named(sha256.hexdigest()), size_bytes=size_bytes, media_type=media_type_of(head)
        )

    async def _put(self, info: BlobInfo, body: IO[bytes]) -> None:
        """An existing object has the same digest, and so the same bytes."""
        try:
            with our_errors():
                await self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._key(info.scope, info.digest),
                    Body=body,
                    ContentLength=info.size_bytes,
                    ContentType=info.media_type or UNKNOWN_MEDIA_TYPE,
                    ChecksumSHA256=_checksum(info.digest),
                    IfNoneMatch="*",
                )
        except ClientError as error:
            if code_of(error) not in PRESENT:
                raise
            if await self.stat(info.scope, info.digest) is None:
                message = "another write of the same blob interfered and failed; write it again"
                raise Unavailable(message, retry_after_s=RETRY_AFTER_S) from error

    async def stat(self, scope: str, digest: str) -> BlobInfo | None:
        found = await self._find(scope, digest)
        if found is None:
            return None
        if found.age_s > TOUCH_EVERY_S:
            await self._touch(scope, digest)
        return found.info

    def recent(self, scope: str, digest: str) -> CachedBlob | None:
        """Nothing is cached: other gateways change the bucket too."""
        return None

    async def tail(self, scope: str, digest: str, *, settled: bool = False) -> StoredTail | None:
        """Counts as a use. What is in the bucket is durable."""
        key = self._key(scope, digest)
        found = await self._tail(key)
        if found is not None and found[1] > TOUCH_EVERY_S:
            await self._touch(scope, digest)
        return found[0] if found is not None else None

    async def _tail(self, key: str) -> tuple[StoredTail, float] | None:
        """With its age in seconds."""
        try:
            with our_errors():
                answer = await self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes=-{FOOTER_BYTES}")
                async with answer["Body"] as body:
                    data = await body.read()
        except ClientError as error:
            if code_of(error) in ABSENT:
                return None
            if code_of(error) not in BEYOND:
                raise
            data, answer = b"", await self._head(key)
            if answer is None:
                return None
        size = answer.get("ContentRange", "").rpartition("/")[2]
        age_s = (datetime.now(UTC) - answer["LastModified"]).total_seconds()
        return StoredTail(int(size) if size else len(data), data), age_s

    async def read_stored(
        self, scope: str, digest: str, *, offset_bytes: int, limit_bytes: int
    ) -> AsyncIterator[bytes]:
        """That span of the object, which is not empty."""
        span = f"bytes={offset_bytes}-{offset_bytes + limit_bytes - 1}"
        try:
            with our_errors():
                answer = await self._client.get_object(Bucket=self._bucket, Key=self._key(scope, digest), Range=span)
                async with answer["Body"] as body:
                    async for chunk in body.iter_chunks(READ_CHUNK_BYTES):
                        yield chunk
        except ClientError as error:
            raise NotFound(f"no blob {digest} any more", field="digest") from error

    async def erase(self, scope: str) -> Erased:
        erased = remaining = 0
        async for found, digest in self._listed(parse_scope(scope, field="scope")):
            try:
                await self.delete(found, digest)
                erased += 1
            except Unavailable as error:
                log.error("blob_not_erased", digest=digest, why=error.message)
                remaining += 1
        return Erased(blobs=erased, remaining=remaining, kept=await self._kept())

    async def _kept(self) -> str:
        """A bucket with versions keeps what is deleted."""
        try:
            with our_errors():
                answer = await self._client.get_bucket_versioning(Bucket=self._bucket)
        except (ClientError, Unavailable) as error:
            log.info("bucket_versioning_unknown", why=str(error))
            return ""
        if not answer.get("Status"):
            return ""
        return (
            f"the bucket {self._bucket} has versions, so it still has the deleted blobs; delete the noncurrent versions"
            f" under {self._prefix}, or let a lifecycle rule do that"
        )

    async def count_seals(self) -> BlobSeals:
        tails = []
        async for scope, digest in self._listed(""):
            if found := await self._tail(self._key(scope, digest)):
                tails.append((scope, found[0]))
        return count_seals(tails)

    async def _listed(self, scope: str) -> AsyncIterator[tuple[str, str]]:
        """Scopes and digests; empty: of all scopes."""
        prefix = f"{self._prefix}{scope}/" if scope else self._prefix
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        with our_errors():
            async for page in pages:
                for each in page.get("Contents", ()):
                    blob = _BLOB.fullmatch(each["Key"].removeprefix(self._prefix))
                    if blob is not None:
                        yield blob[1], named(blob[2] + blob[3])

    async def settle(self, scope: str, digest: str) -> BlobInfo | None:
        """A bucket answers only after the object is durable."""
        return await self.stat(scope, digest)

    async def _find(self, scope: str, digest: str) -> _Found | None:
        """Reads its first bytes, which also give its media type."""
        key = self._key(scope, digest)
        try:
            with our_errors():
                answer = await self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes=0-{HEAD_BYTES - 1}")
                async with answer["Body"] as body:
                    head = await body.read()
        except ClientError as error:
            if code_of(error) in ABSENT:
                return None
            if code_of(error) not in BEYOND:
                raise
            head, answer = b"", await self._head(key)
            if answer is None:
                return None
        size = answer.get("ContentRange", "").rpartition("/")[2]
        info = BlobInfo(
            scope=scope, digest=digest, size_bytes=int(size) if size else len(head), media_type=media_type_of(head)
        )
        return _Found(info=info, age_s=(datetime.now(UTC) - answer["LastModified"]).total_seconds())

    async def _head(self, key: str) -> Any:
        try:
            with our_errors():
                return await self._client.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if code_of(error) in ABSENT:
                return None
            raise

    async def _touch(self, scope: str, digest: str) -> None:
        """Copy it onto itself, which resets its age."""
        key = self._key(scope, digest)
        try:
            with our_errors():
                await self._client.copy_object(
                    Bucket=self._bucket,
                    Key=key,
                    CopySource={"Bucket": self._bucket, "Key": key},
                    MetadataDirective="REPLACE",
                )
        except ClientError as error:
            if code_of(error) not in ABSENT:
                raise

    async def read(
        self, scope: str, digest: str, *, offset_bytes: int = 0, limit_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        found = await self._find(scope, digest)
        if found is None:
            raise NotFound(f"no blob {digest}", field="digest")
        size_bytes = found.info.size_bytes
        if offset_bytes > size_bytes:
            raise OutOfRange(f"the blob has {size_bytes} bytes", field="offset_bytes")
        end = min(size_bytes, offset_bytes + limit_bytes) if limit_bytes else size_bytes
        if offset_bytes == end:
            return
        try:
            with our_errors():
                answer = await self._client.get_object(
                    Bucket=self._bucket, Key=self._key(scope, digest), Range=f"bytes={offset_bytes}-{end - 1}"
                )
                async with answer["Body"] as body:
                    async for chunk in body.iter_chunks(READ_CHUNK_BYTES):
                        yield chunk
        except ClientError as error:
            raise NotFound(f"no blob {digest} any more", field="digest") from error

    async def delete(self, scope: str, digest: str) -> None:
        with our_errors():
            await self._client.delete_object(Bucket=self._bucket, Key=self._key(scope, digest))

    async def sweep(self, *, older_than_s: float, now_s: float, keep: Keep) -> int:
        swept = 0
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        with our_errors():
            async for page in pages:
                for each in page.get("Contents", ()):
                    swept += await self._sweep_one(each, older_than_s, now_s, keep)
        return swept

    async def _sweep_one(self, each: Any, older_than_s: float, now_s: float, keep: Keep) -> bool:
        blob = _BLOB.fullmatch(each["Key"].removeprefix(self._prefix))
        if blob is None:
            # Not one of ours.
            return False
        scope, digest = blob[1], named(blob[2] + blob[3])
        age_s = now_s - each["LastModified"].timestamp()
        if keep(scope, digest):
            if age_s > older_than_s / 2:
                await self._touch(scope, digest)
            return False
        if age_s <= older_than_s:
            return False
        await self.delete(scope, digest)
        return True

    async def prepare_upload(self, scope: str, digest: str, size_bytes: int) -> Upload | None:
        """A signed address for exactly those bytes; None if the blob exists. TooLarge."""
        if size_bytes > self._blob_limit_bytes:
            raise TooLarge(f"a blob has at most {self._blob_limit_bytes} bytes", field="size_bytes")
        if await self.stat(scope, digest) is not None:
            return None
        parameters = {
            "Bucket": self._bucket,
            "Key": self._key(scope, digest),
            "ContentLength": size_bytes,
            "ChecksumSHA256": _checksum(digest),
            "IfNoneMatch": "*",
        }
        with our_errors():
            url = await self._client.generate_presigned_url("put_object", Params=parameters, ExpiresIn=UPLOAD_S)
        # Signed with the address: S3 accepts these bytes only, and only while the object does not exist.
        return Upload(
            url=url,
            headers={
                "Content-Length": str(size_bytes),
                "If-None-Match": "*",
                "x-amz-checksum-sha256": _checksum(digest),
            },
        )

    async def prepare_read(self, scope: str, digest: str) -> str:
        """NotFound."""
        info = await self.stat(scope, digest)
        if info is None:
            raise NotFound(f"no blob {digest}", field="digest")
        parameters = {
            "Bucket": self._bucket,
            "Key": self._key(scope, digest),
            # An object that was uploaded directly has no media type of its own.
            "ResponseContentType": info.media_type or UNKNOWN_MEDIA_TYPE,
        }
        with our_errors():
            url = await self._client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=READ_S)
        return str(url)

    def _key(self, scope: str, digest: str) -> str:
        name = parse_digest(digest, field="digest").removeprefix("sha256:")
        return f"{self._prefix}{parse_scope(scope, field='scope')}/{name[:2]}/{name[2:]}"


def _write_all(spool: IO[bytes], pieces: Sequence[bytes]) -> None:
    try:
        for piece in pieces:
            spool.write(piece)
    except OSError as error:
        raise no_temporary_file(error) from error


def _sha256_of(body: IO[bytes]) -> tuple[int, str]:
    """Its bytes, and their checksum as S3 writes it."""
    sha256, size_bytes = hashlib.sha256(), 0
    body.seek(0)
    while part := body.read(READ_CHUNK_BYTES):
        sha256.update(part)
        size_bytes += len(part)
    return size_bytes, base64.b64encode(sha256.digest()).decode()


def _checksum(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest.removeprefix("sha256:"))).decode()


@asynccontextmanager
async def open_s3_blobs(url: str, *, endpoint: str, region: str, blob_limit_bytes: int) -> AsyncIterator[S3Blobs]:
    """The bucket of `s3://BUCKET/PREFIX`, with the credentials that AWS tools find. SettingsError if unusable."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise SettingsError("FANLIGHT_GATEWAY_BLOBS: must be s3://BUCKET or s3://BUCKET/PREFIX")
    try:
        network, trust = s3_connection(endpoint)
    except BadProxy as error:
        raise SettingsError(str(error)) from error
    config = AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "path"} if endpoint else {},
        connect_timeout=CALL_S,
        read_timeout=CALL_S,
        retries={"max_attempts": 2},
        max_pool_connections=50,
        **network,
    )
    client = get_session().create_client(
        "s3", endpoint_url=endpoint or None, region_name=region or None, config=config, **trust
    )
    async with client as opened:
        try:
            await opened.head_bucket(Bucket=bucket)
        except (ClientError, BotoCoreError) as error:
            raise SettingsError(f"{url}: cannot be used: {described(error)}") from error
        folder = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        yield S3Blobs(opened, bucket=bucket, prefix=folder, blob_limit_bytes=blob_limit_bytes)
