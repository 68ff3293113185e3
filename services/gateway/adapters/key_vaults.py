"""Where wrapped data keys are stored: a folder of files, or a bucket of a RecordStore that several gateways share."""

import asyncio
import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fanlight.errors import AlreadyExists, Conflict, ResourceExhausted, Unavailable
from services.gateway.ports import RecordStore
from services.kernel.disks import RETRY_AFTER_S, why
from services.kernel.private_files import FOLDER_MODE, close_tree, private

SUFFIX = ".json"
LOCK = ".lock"
# Beside the data, and backed up apart from it.
BUCKET = "data_keys"
ROUNDS_LIMIT = 20
PAGE = 1_000

Event = Callable[[bytes | None], bytes]


class FolderVault:
    """A file per name, replaced as a whole. Changes hold a lock of the folder, also against other processes."""

    def __init__(self, folder: Path) -> None:
        """OSError where the folder cannot be made."""
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        close_tree(folder)
        self._folder = folder
        self.place = str(folder)

    async def get(self, name: str) -> bytes | None:
        return await asyncio.to_thread(self._get, name)

    async def change(self, name: str, event: Event) -> bytes:
        return await asyncio.to_thread(self._change, name, event)

    async def names(self) -> Sequence[str]:
        return await asyncio.to_thread(self._names)

    def _get(self, name: str) -> bytes | None:
        with self._our_errors():
            try:
                return self._path(name).read_bytes()
            except FileNotFoundError:
                # A folder that is gone is not one without keys: new ones in their place would cost the data.
                self._folder.stat()
                return None

    def _change(self, name: str, event: Event) -> bytes:
        with self._our_errors(), self._locked():
            before = self._get(name)
            after = event(before)
            if after != before:
                self._write(self._path(name), after)
            return after

    def _names(self) -> Sequence[str]:
        with self._our_errors():
            return sorted(each.stem for each in self._folder.iterdir() if each.suffix == SUFFIX)

    def _write(self, path: Path, data: bytes) -> None:
        new = path.with_name(f".{uuid.uuid4().hex}")
        try:
            with open(new, "xb", opener=private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
        finally:
            new.unlink(missing_ok=True)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / LOCK, "ab", opener=private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"the wrapped data keys in {self._folder} cannot be used: {why(error)}"
            raise Unavailable(message, retry_after_s=RETRY_AFTER_S) from error

    def _path(self, name: str) -> Path:
        assert "/" not in name
        return self._folder / f"{name}{SUFFIX}"


class StoreVault:
    """A bucket of its own in a RecordStore."""

    def __init__(self, store: RecordStore, place: str) -> None:
        self._store = store
        self.place = place

    async def get(self, name: str) -> bytes | None:
        record = await self._store.get(BUCKET, name)
        return record.value if record else None

    async def change(self, name: str, event: Event) -> bytes:
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(BUCKET, name)
            before = record.value if record else None
            after = event(before)
            if after == before:
                return after
            with contextlib.suppress(AlreadyExists, Conflict):
                if record is None:
                    await self._store.create(BUCKET, name, after)
                else:
                    await self._store.put(BUCKET, name, after, revision=record.revision)
                return after
        raise ResourceExhausted("the wrapped keys change too often at the moment; try again", retry_after_s=1.0)

    async def names(self) -> Sequence[str]:
        found: list[str] = []
        while records := await self._store.list(BUCKET, before=found[-1] if found else "", limit=PAGE):
            found += [record.key for record in records]
        return sorted(found)
