"""How another download of the same bytes stands, as its journal tells. Only reads; knows no lock and no network."""

import json
from dataclasses import replace
from pathlib import Path

from services.weights.chunks import ChunkMap
from services.weights.pacing import Meter
from services.weights.partial import RECORD_BYTES, journal_of, replay
from services.weights.targets import Progress

LOOK_S = 0.5
SOURCE = "another asker"
MAX_HEAD_BYTES = 64 * 1024


class Onlooker:
    """`progress` is what is told of it, with the numbers left open."""

    def __init__(self, folder: Path, key: str, progress: Progress) -> None:
        self._journal = journal_of(folder, key)
        self._progress = replace(progress, source=SOURCE)
        self._meter = Meter()
        self._map: ChunkMap | None = None
        self._at = 0
        self._next_s = float("-inf")

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to look again."""
        if now_s < self._next_s:
            return False
        self._next_s = now_s + LOOK_S
        return True

    def look(self, now_s: float) -> Progress | None:
        """What is there now; None where nothing is known. Blocking, for as long as what is new of the journal takes."""
        before = self._map.done_bytes if self._map else None
        try:
            self._read()
        except (OSError, ValueError, KeyError, TypeError):
            self._map = None
        if self._map is None:
            return None
        done = self._map.done_bytes
        # What was there before the first look says nothing about the link.
        self._meter.count(max(0, done - before) if before is not None else 0, now_s)
        return replace(
            self._progress,
            done_bytes=done,
            total_bytes=self._map.size,
            bytes_per_s=self._meter.bytes_per_s(now_s),
        )

    def _read(self) -> None:
        with self._journal.open("rb") as file:
            if self._map is None or file.seek(0, 2) < self._at:
                file.seek(0)
                head = file.readline(MAX_HEAD_BYTES)
                self._map, self._at = ChunkMap(int(json.loads(head)["size"])), len(head)
            file.seek(self._at)
            data = file.read()
        for at in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
            if not replay(self._map, data[at : at + RECORD_BYTES]):
                return
            self._at += RECORD_BYTES
