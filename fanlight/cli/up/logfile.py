"""A child's log: a file that it writes itself, so that it can go on when whoever started it is gone."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import BinaryIO

# One such file and the one before it are kept.
LOG_LIMIT_BYTES = 32 * 1024 * 1024
TAIL_BYTES = 16 * 1024


class LogFile:
    def __init__(self, path: Path, *, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
        self.path = path
        self._limit_bytes = limit_bytes

    def open(self) -> BinaryIO:
        """For appending, as a child's standard error."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.trim()
        return self.path.open("ab")

    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def trim(self) -> None:
        """Move what is there aside when it is too much. Writers go on at the new end, since they append."""
        if self.size_bytes() > self._limit_bytes:
            shutil.copyfile(self.path, self.path.with_suffix(".log.1"))
            with self.path.open("r+b") as file:
                file.truncate(0)

    def last_line(self, *, since_bytes: int) -> str:
        """The last words of who has written since; empty where there are none."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(max(since_bytes, self.size_bytes() - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    async def follow(
        self, write: Callable[[str], None], *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Every whole line from now on, until cancelled."""
        at, rest = self.size_bytes(), b""
        while True:
            if self.size_bytes() < at:
                at, rest = 0, b""
            if self.size_bytes() > at:
                with self.path.open("rb") as file:
                    file.seek(at)
                    new = file.read()
                at += len(new)
                *lines, rest = (rest + new).split(b"\n")
                for line in lines:
                    write(line.decode(errors="replace"))
            await sleep(0.2)
