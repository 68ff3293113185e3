"""Input pictures: found wherever they are, fetched once, kept within a budget."""

import asyncio

from fanlight.common.v1 import common_pb2
from fanlight.queue.v1 import queue_pb2
from services.worker.input_pictures import InputPictures, pictures_of


class Blobs:
    """Gives the digest's own letters as the bytes."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    async def read(self, blob: common_pb2.Blob) -> bytes:
        self.reads.append(blob.digest)
        await asyncio.sleep(0)
        return blob.digest.encode()


def painting(*digests: str, scope: str = "") -> queue_pb2.LeasedTask:
    task = queue_pb2.LeasedTask(name="jobs/a/tasks/1")
    for digest in digests:
        task.generate.controls.add(controlnet="canny").image.blob.CopyFrom(
            common_pb2.Blob(scope=scope, digest=digest, size_bytes=len(digest))
        )
    return task


def data_of(task: queue_pb2.LeasedTask) -> list[bytes]:
    return [picture.data for picture in pictures_of(task)]


async def test_every_control_image_is_filled_in() -> None:
    task = painting("aaaa", "bbbb")
    await InputPictures(Blobs(), cache_bytes=100).fill(task)
    assert data_of(task) == [b"aaaa", b"bbbb"]


async def test_bytes_that_came_with_the_task_stay() -> None:
    task = queue_pb2.LeasedTask()
    task.annotate.picture.data = b"here already"
    task.annotate.parameters["low"] = 1
    await InputPictures(Blobs(), cache_bytes=100).fill(task)
    assert data_of(task) == [b"here already"]


async def test_tasks_that_want_the_same_picture_at_once_fetch_it_once() -> None:
    blobs = Blobs()
    pictures = InputPictures(blobs, cache_bytes=100)
    await asyncio.gather(*(pictures.fill(painting("aaaa")) for _ in range(3)))
    assert blobs.reads == ["aaaa"]


async def test_the_least_recently_used_picture_leaves_when_the_budget_is_used_up() -> None:
    blobs = Blobs()
    pictures = InputPictures(blobs, cache_bytes=8)
    for digest in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        await pictures.fill(painting(digest))
    assert blobs.reads == ["aaaa", "bbbb", "cccc", "bbbb"]


async def test_a_picture_larger_than_the_budget_is_not_kept_and_drives_no_other_out() -> None:
    blobs = Blobs()
    pictures = InputPictures(blobs, cache_bytes=5)
    for digest in ("aaaa", "bbbbbbbb", "bbbbbbbb", "aaaa"):
        await pictures.fill(painting(digest))
    assert blobs.reads == ["aaaa", "bbbbbbbb", "bbbbbbbb"]


async def test_the_same_digest_in_another_scope_is_another_picture() -> None:
    blobs = Blobs()
    pictures = InputPictures(blobs, cache_bytes=100)
    await pictures.fill(painting("aaaa", scope="one"))
    await pictures.fill(painting("aaaa", scope="two"))
    assert blobs.reads == ["aaaa", "aaaa"]
