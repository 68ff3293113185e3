"""Small input images of leased tasks, which travel with the lease: no calls of the worker for them, and none of ours.

Best effort: what is not given here, the worker reads as a blob.
"""

from collections.abc import Sequence
from dataclasses import replace

from fanlight.contract.limits import INLINE_BLOB_LIMIT_BYTES, INLINE_LEASE_LIMIT_BYTES
from fanlight.errors import FanlightError
from services.gateway.app.lease_rights import BlobKey, ImagesOf
from services.gateway.app.leasing import InlineInput, LeasedTask
from services.gateway.ports import DirectTransfer
from services.kernel.blobs import BlobStore


class InlineInputs:
    def __init__(self, blobs: BlobStore, images_of: ImagesOf) -> None:
        """`images_of`: the blobs that a task's message names."""
        self._blobs, self._images_of = blobs, images_of
        # Where workers reach the storage themselves, the bytes take no way through the gateway.
        self._is_on = not isinstance(blobs, DirectTransfer)

    @property
    def output_bytes_max(self) -> int:
        """How large an output may be that comes along with a completion."""
        return INLINE_BLOB_LIMIT_BYTES if self._is_on else 0

    async def with_images(self, leased: Sequence[LeasedTask], *, bytes_max: int) -> Sequence[LeasedTask]:
        """The tasks, with as many of their small images as fit; each image once."""
        left_bytes = min(bytes_max, INLINE_LEASE_LIMIT_BYTES) if self._is_on else 0
        if not left_bytes:
            return leased
        given: set[BlobKey] = set()
        filled = []
        for each in leased:
            inputs = []
            for key in dict.fromkeys(self._images_of(each.job, each.task)):
                data = b"" if key in given else await self._read(key, min(left_bytes, INLINE_BLOB_LIMIT_BYTES))
                if data:
                    given.add(key)
                    left_bytes -= len(data)
                    inputs.append(InlineInput(scope=key[0], digest=key[1], data=data))
            filled.append(replace(each, inline_inputs=tuple(inputs)) if inputs else each)
        return filled

    async def _read(self, key: BlobKey, bytes_max: int) -> bytes:
        """Empty where it is larger or cannot be read."""
        try:
            info = await self._blobs.stat(*key)
            if info is None or info.size_bytes > bytes_max:
                return b""
            return b"".join([chunk async for chunk in self._blobs.read(*key)])
        except FanlightError:
            return b""
