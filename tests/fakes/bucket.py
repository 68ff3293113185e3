"""A bucket of a SeaweedFS, and stores over it, each in a folder of its own."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.fakes.seaweed import Seaweed

NAME = "blobs"
READY_S = 30.0


class Bucket:
    def __init__(self, server: Seaweed) -> None:
        self.server = server

    def environment(self) -> dict[str, str]:
        """What a gateway over the bucket is started with."""
        return {
            "AWS_ACCESS_KEY_ID": self.server.key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret,
            "FANLIGHT_GATEWAY_BLOBS": f"s3://{NAME}/{uuid.uuid4().hex}",
            "FANLIGHT_GATEWAY_S3_ENDPOINT": self.server.endpoint,
            "FANLIGHT_GATEWAY_S3_REGION": "us-east-1",
        }

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        config = AioConfig(signature_version="s3v4", s3={"addressing_style": "path"})
        async with get_session().create_client(
            "s3",
            endpoint_url=self.server.endpoint,
            region_name="us-east-1",
            config=config,
            aws_access_key_id=self.server.key,
            aws_secret_access_key=self.server.secret,
        ) as client:
            yield client

    async def ready(self) -> None:
        """The bucket is there and takes objects; a server that has just started takes none for a moment."""
        from botocore.exceptions import BotoCoreError, ClientError

        async with asyncio.timeout(READY_S), self.client() as client:
            while True:
                try:
                    if NAME not in [each["Name"] for each in (await client.list_buckets())["Buckets"]]:
                        await client.create_bucket(Bucket=NAME)
                    await client.put_object(Bucket=NAME, Key="probe", Body=b"x")
                    return
                except (ClientError, BotoCoreError):
                    await asyncio.sleep(0.2)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Callable[..., Any]]:
        """Makes stores, all over the same folder."""
        from services.gateway.adapters.s3_blobs import S3Blobs

        await self.ready()
        prefix = f"{uuid.uuid4().hex}/"
        async with self.client() as client:

            def make(*, budget_bytes: int = 0, blob_limit_bytes: int = 1_000_000) -> S3Blobs:
                return S3Blobs(client, bucket=NAME, prefix=prefix, blob_limit_bytes=blob_limit_bytes)

            yield make
