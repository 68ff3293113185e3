"""Where mirrors are written: a folder, or a place in S3."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fanlight.errors import InvalidField
from services.weights import s3
from services.weights.files import sync
from services.weights.publishing import Destination
from services.weights.references import LocalRef, S3Ref, parse
from services.weights.resolve import local_path
from services.weights.settings import WeightsSettings

T = TypeVar("T")


class FolderDestination:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    def has(self, name: str, size_bytes: int) -> bool:
        path = self._folder / name
        return path.is_file() and path.stat().st_size == size_bytes

    def put(self, name: str, path: Path) -> None:
        fresh = self._folder / f".{name}.part"
        shutil.copyfile(path, fresh)
        sync(fresh)
        fresh.rename(self._folder / name)
        sync(self._folder)


class S3Destination:
    """Below s3://BUCKET/KEY. Its calls run on the loop that `run` gives them to."""

    def __init__(self, place: S3Ref, settings: WeightsSettings, loop: asyncio.AbstractEventLoop) -> None:
        self._place = place
        self._settings = settings
        self._loop = loop

    def _at(self, name: str) -> S3Ref:
        return S3Ref(bucket=self._place.bucket, key=f"{self._place.key.rstrip('/')}/{name}")

    def _do(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        work = call(*arguments, endpoint=self._settings.s3_endpoint, region=self._settings.s3_region)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def read(self, name: str) -> bytes | None:
        return self._do(s3.read, self._at(name))

    def has(self, name: str, size_bytes: int) -> bool:
        return self._do(s3.size_of, self._at(name)) == size_bytes

    def put(self, name: str, path: Path) -> None:
        self._do(s3.upload, self._at(name), path)


def destination(text: str, settings: WeightsSettings, loop: asyncio.AbstractEventLoop) -> Destination:
    """The mirror that `text` names: a path, or s3://BUCKET/PREFIX."""
    match parse(text):
        case LocalRef(path=path):
            return FolderDestination(local_path(path))
        case S3Ref() as place:
            return S3Destination(place, settings, loop)
    raise InvalidField(f"{text!r} must be a path such as ./mirror, or s3://BUCKET/PREFIX", field="to")
