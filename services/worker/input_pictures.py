"""Puts the bytes of a request's input images in place of their blobs; keeps the latest for the next task."""

import asyncio
from collections import OrderedDict
from typing import Protocol
from weakref import WeakValueDictionary

from google.protobuf.message import Message

from fanlight.common.v1 import common_pb2
from fanlight.contract.images import images_of

Key = tuple[str, str]


class ReadsBlobs(Protocol):
    async def read(self, blob: common_pb2.Blob) -> bytes: ...


class InputPictures:
    """Fetches each picture once, also when several tasks want it at the same time."""

    def __init__(self, blobs: ReadsBlobs, *, cache_bytes: int) -> None:
        self._blobs = blobs
        self._cache_bytes = cache_bytes
        # By scope and digest, the least recently used first.
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._fetching: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    async def fill(self, request: Message) -> None:
        """Whatever the message is, and however deep its images lie."""
        for _, picture in list(images_of(request)):
            if picture.HasField("blob"):
                picture.data = await self._get(picture.blob)

    async def _get(self, blob: common_pb2.Blob) -> bytes:
        key = (blob.scope, blob.digest)
        lock = self._fetching.setdefault(key, asyncio.Lock())
        async with lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            data = await self._blobs.read(blob)
            self._keep(key, data)
            return data

    def _keep(self, key: Key, data: bytes) -> None:
        if len(data) > self._cache_bytes:
            return
        self._kept[key] = data
        self._kept_bytes += len(data)
        while self._kept_bytes > self._cache_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)
