"""What a bucket answers, in our words. Knows no blob."""

from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from fanlight.errors import Unavailable

RETRY_AFTER_S = 2.0

ABSENT = ("404", "NoSuchKey", "NotFound")
PRESENT = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
BEYOND = ("InvalidRange", "416")


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def our_errors() -> Iterator[None]:
    """Answers that mean something to the caller pass; everything else is a store that is away."""
    try:
        yield
    except ClientError as error:
        if code_of(error) in (*ABSENT, *PRESENT, *BEYOND):
            raise
        raise Unavailable(f"the blob store refuses: {code_of(error)}", retry_after_s=RETRY_AFTER_S) from error
    except (BotoCoreError, aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Unavailable("the blob store does not answer", retry_after_s=RETRY_AFTER_S) from error
