"""Blobs as they are told on the wire."""

from fanlight.common.v1 import common_pb2
from services.kernel.blobs import BlobInfo


def blob(value: BlobInfo) -> common_pb2.Blob:
    return common_pb2.Blob(
        scope=value.scope, digest=value.digest, size_bytes=value.size_bytes, media_type=value.media_type
    )


def picture_of(info: BlobInfo) -> common_pb2.Picture:
    """A kept image by its digest."""
    return common_pb2.Picture(blob=blob(info))
