"""Request bodies that are compressed: gzip is inflated as it comes, within the body's limit. Knows no message."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import Request

from fanlight.errors import InvalidField
from services.gateway.http.errors import UnsupportedEncoding

GZIP = ("gzip", "x-gzip")
# How many characters of unknown encodings the error repeats.
NAMES_QUOTED = 100
# What is inflated before other requests have their turn.
PIECE_BYTES = 256 * 1024
# zlib's window of 32 KiB, in gzip's format.
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


def is_compressed(request: Request) -> bool:
    """Whether the body is gzip. UnsupportedEncoding for every other encoding than none."""
    named = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    encodings = [each for each in (part.strip() for part in named) if each not in ("", "identity")]
    if not encodings:
        return False
    if len(encodings) == 1 and encodings[0] in GZIP:
        return True
    text = ", ".join(encodings)[:NAMES_QUOTED]
    raise UnsupportedEncoding(f"is {text}; send the body as it is, or as gzip", field="Content-Encoding")


async def inflated(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The bytes of a gzip stream of any number of members, in pieces. InvalidField where it is none, or ends early."""
    member = zlib.decompressobj(_GZIP_WINDOW)
    async for chunk in chunks:
        data = chunk
        while data:
            if member.eof:
                # Some tools fill the last block with zeros.
                data = data.lstrip(b"\0")
                member = zlib.decompressobj(_GZIP_WINDOW) if data else member
                continue
            try:
                piece = member.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise InvalidField(f"is not gzip, as Content-Encoding says: {error}", field="body") from error
            data = member.unused_data if member.eof else member.unconsumed_tail
            if piece:
                yield piece
                await asyncio.sleep(0)
    if not member.eof:
        raise InvalidField("ends before its gzip stream does", field="body")
