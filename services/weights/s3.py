"""Addresses of S3 objects: presigned, so that the same ranges, retries and checks serve them as any other source.

Keys come from where AWS tools take them: environment, profile, or the machine's role.
"""

from services.kernel.errors import FailedPrecondition
from services.weights.errors import TokenRefused
from services.weights.references import S3Ref

# Longer than any download that makes sense; one that outlives it is asked for again and goes on.
EXPIRES_S = 12 * 3600


async def presigned(reference: S3Ref, *, endpoint: str, region: str) -> str:
    """An address that anybody may read the object from for EXPIRES_S. TokenRefused without keys."""
    try:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise FailedPrecondition(f"{reference} needs aiobotocore: pip install 'fanlight[s3]'") from error
    # Path style: a bucket's name need not be a host's.
    config = AioConfig(signature_version="s3v4", s3={"addressing_style": "path"} if endpoint else {})
    try:
        session = get_session()
        async with session.create_client(
            "s3", endpoint_url=endpoint or None, region_name=region or None, config=config
        ) as client:
            parameters = {"Bucket": reference.bucket, "Key": reference.key}
            address: str = await client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=EXPIRES_S)
            return address
    except BotoCoreError as error:
        raise TokenRefused(f"{reference}: {error}", field="reference") from error
