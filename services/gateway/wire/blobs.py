"""Blobs as they are told on the wire."""

from fanlight.common.v1 import common_pb2
from services.kernel.blobs import BlobInfo


def blob(value: BlobInfo) -> common_pb2.Blob:
    return common_pb2.Blob(
        scope=value.scope, digest=value.digest, size_bytes=value.size_bytes, media_type=value.media_type
    )


def put(image: common_pb2.ImageSource, info: BlobInfo) -> None:
    """The kept image, by its digest, in the place of its bytes. Fields that are newer than this gateway stay."""
    image.blob.CopyFrom(blob(info))
