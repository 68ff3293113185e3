"""A store of weights whose references lie in folders already."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from fanlight.errors import NodeFault
from services.weights.store.index import HeldModel
from services.weights.transfer.download import DownloadProgress


class FakeStore:
    """Says what was asked for and what is in use."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = paths
        self.asked: list[tuple[str, str]] = []
        self.in_use: list[str] = []
        self.held: list[HeldModel] = []
        self.link_bps = 0.0
        self.room_bytes = 0

    @contextlib.asynccontextmanager
    async def obtain(self, reference, pipeline="", *, report):
        self.asked.append((reference, pipeline))
        if reference not in self.paths:
            raise NodeFault(f"{reference}: no source has it")
        progress = DownloadProgress(
            reference=reference, path="x", done_bytes=1, total_bytes=2, bytes_per_s=1.0, source="somewhere"
        )
        report(progress)
        self.in_use.append(reference)
        yield self.paths[reference]
        self.in_use.remove(reference)

    def inventory(self):
        return self.held
