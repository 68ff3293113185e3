"""A request's images as the app takes them (bytes, or the digest of a blob), and blobs on the wire. Fetches nothing."""

from google.protobuf.message import Message

from fanlight.common.v1 import common_pb2
from fanlight.contract.images import data_of, images_of
from fanlight.contract.names import parse_digest, parse_scope
from services.gateway.app.submission import SourceImage
from services.kernel.blobs import BlobInfo


def source_images(message: Message, field: str) -> tuple[SourceImage, ...]:
    """Every image of a stage's request, in the order of its fields. InvalidField names the client's field."""
    return tuple(_source(image, f"{field}.{path}") for path, image in images_of(message))


def _source(image: common_pb2.ImageSource, field: str) -> SourceImage:
    if image.WhichOneof("source") != "blob":
        return SourceImage(field=field, data=data_of(image, field))
    return SourceImage(
        field=field,
        scope=parse_scope(image.blob.scope, field=f"{field}.blob.scope"),
        digest=parse_digest(image.blob.digest, field=f"{field}.blob.digest"),
    )


def blob(value: BlobInfo) -> common_pb2.Blob:
    return common_pb2.Blob(
        scope=value.scope, digest=value.digest, size_bytes=value.size_bytes, media_type=value.media_type
    )


def put_blob(image: common_pb2.ImageSource, info: BlobInfo) -> None:
    """Replace the image's bytes by the digest of its stored blob. Fields that are newer than this gateway stay."""
    image.blob.CopyFrom(blob(info))
