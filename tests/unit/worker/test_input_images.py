"""Input images: found at any depth, fetched once (single flight), cached within a budget."""

import asyncio

from google.protobuf.message import Message

from fanlight.common.v1 import common_pb2
from fanlight.contract.images import images_of
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.worker.runner import InputImages


class Blobs:
    """Gives the digest's own letters as the bytes."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    async def read(self, blob: common_pb2.Blob) -> bytes:
        self.reads.append(blob.digest)
        await asyncio.sleep(0)
        return blob.digest.encode()


def generation(*digests: str, scope: str = "") -> diffusion_pb2.GenerateRequest:
    request = diffusion_pb2.GenerateRequest()
    for digest in digests:
        request.controls.add(controlnet="canny").image.blob.CopyFrom(
            common_pb2.Blob(scope=scope, digest=digest, size_bytes=len(digest))
        )
    return request


def data_of(request: Message) -> list[bytes]:
    return [image.data for _, image in images_of(request)]


async def test_every_control_image_is_filled_in() -> None:
    request = generation("aaaa", "bbbb")
    await InputImages(Blobs(), cache_bytes=100).fill(request)
    assert data_of(request) == [b"aaaa", b"bbbb"]


async def test_bytes_that_came_with_the_request_stay() -> None:
    request = preprocessor_pb2.AnnotateRequest()
    request.image.data = b"here already"
    request.parameters["low"] = 1
    await InputImages(Blobs(), cache_bytes=100).fill(request)
    assert data_of(request) == [b"here already"]


async def test_tasks_that_want_the_same_image_at_once_fetch_it_once() -> None:
    blobs = Blobs()
    images = InputImages(blobs, cache_bytes=100)
    await asyncio.gather(*(images.fill(generation("aaaa")) for _ in range(3)))
    assert blobs.reads == ["aaaa"]


async def test_the_least_recently_used_image_leaves_when_the_budget_is_used_up() -> None:
    blobs = Blobs()
    images = InputImages(blobs, cache_bytes=8)
    for digest in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        await images.fill(generation(digest))
    assert blobs.reads == ["aaaa", "bbbb", "cccc", "bbbb"]


async def test_a_image_larger_than_the_budget_is_not_kept_and_drives_no_other_out() -> None:
    blobs = Blobs()
    images = InputImages(blobs, cache_bytes=5)
    for digest in ("aaaa", "bbbbbbbb", "bbbbbbbb", "aaaa"):
        await images.fill(generation(digest))
    assert blobs.reads == ["aaaa", "bbbbbbbb", "bbbbbbbb"]


async def test_the_same_digest_in_another_scope_is_another_image() -> None:
    blobs = Blobs()
    images = InputImages(blobs, cache_bytes=100)
    await images.fill(generation("aaaa", scope="one"))
    await images.fill(generation("aaaa", scope="two"))
    assert blobs.reads == ["aaaa", "aaaa"]
