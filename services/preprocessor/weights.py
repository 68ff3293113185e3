"""Which weights an annotator needs, and where they come from: a folder on disk, or the weights' store.

Knows no network library and nothing of how the store works.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from fanlight.errors import FailedPrecondition, FanlightError, NodeFault
from services.preprocessor.config import CPU, AnnotatorDevice
from services.weights.settings import WeightsSettings

if TYPE_CHECKING:
    from services.weights.provision import Provision
    from services.weights.references.manifest import Manifest
    from services.weights.transfer.download import DownloadProgress


class UnusableWeights(FailedPrecondition):
    """An annotator's weights are damaged or of another network.

    Trying again here gives the same error; another node may have sound files, and is asked before the task ends.
    """

    reason = "BAD_WEIGHTS"
    is_request_fault = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorWeights:
    """A network and its weights. Annotators that name the same one share it in memory."""

    name: str
    # An entry of the weights' catalog.
    entry: str
    # Builds what `Annotator.apply` receives as its model, from the folder with the files.
    build: Callable[[Path, AnnotatorDevice], Any]
    # Whether it runs on a GPU where there is one; otherwise it runs on the CPU everywhere.
    uses_gpu: bool = True

    def device(self, found: AnnotatorDevice) -> AnnotatorDevice:
        """The device it runs on, on a node with the device `found`."""
        return found if self.uses_gpu else replace(found, kind=CPU)

    @property
    def manifest(self) -> "Manifest":
        return _manifest(self.entry)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.manifest.files)

    @property
    def sha256s(self) -> tuple[str, ...]:
        return tuple(file.sha256 for file in self.manifest.files if file.sha256)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.manifest.files)

    def describe_files(self) -> str:
        """Each file and its source, for error messages."""
        sources = [file.sources[0] if file.sources else self.manifest.view for file in self.manifest.files]
        return ", ".join(f"{name} from {source}" for name, source in zip(self.files, sources, strict=True))

    def missing_files(self, folder: Path) -> list[str]:
        return [name for name in self.files if not (folder / name).is_file()]

    def altered_files(self, folder: Path) -> tuple[str, ...]:
        """Those that exist and whose digest is not the pinned one: files in a folder are not checked before use."""
        pinned = [(file.path, file.sha256) for file in self.manifest.files if file.sha256]
        return tuple(name for name, sha256 in pinned if _sha256_of(folder / name) not in ("", sha256))


def answers_of(outputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs (...,) of a network that is not torch's. UnusableWeights where a value is no number."""
    if any(np.isnan(each).any() for each in outputs):
        raise UnusableWeights(
            "the annotator's network answers with values that are no numbers, so its weights are damaged; "
            "delete them, so that they are fetched again, or replace them",
            field="annotator",
        )
    return outputs


def _sha256_of(path: Path) -> str:
    """Empty where the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


@cache
def _manifest(entry: str) -> "Manifest":
    # Imported on first use: a process that needs no weights starts sooner.
    from services.weights.references.catalog import shipped

    return shipped().require(entry)


# Called with the progress of a download.
OnProgress = Callable[["DownloadProgress"], None]


def ignore_progress(progress: "DownloadProgress") -> None:
    """For callers that do not show a download's progress."""


class Weights(Protocol):
    def folder(
        self, weights: AnnotatorWeights, report: OnProgress = ...
    ) -> contextlib.AbstractAsyncContextManager[Path]:
        """The folder with the files, which stays while this is open. FanlightError names what is missing."""
        ...


class FolderWeights:
    """Files that lie in a folder as AUTHOR/NAME/FILE, such as in a container image; `fallback` has the others."""

    def __init__(self, root: Path | None, fallback: Weights) -> None:
        self._root = root
        self._fallback = fallback

    @contextlib.asynccontextmanager
    async def folder(self, weights: AnnotatorWeights, report: OnProgress = ignore_progress) -> AsyncIterator[Path]:
        if self._root is not None:
            folder = self._root / weights.manifest.view
            if not weights.missing_files(folder):
                yield folder
                return
        async with self._fallback.folder(weights, report) as path:
            yield path


class StoreWeights:
    """From the weights' store, which fetches what it does not have yet. Use as an async context manager.

    The code that fetches is imported on first use: a process that needs no weights starts sooner.
    """

    def __init__(self, settings: WeightsSettings) -> None:
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        self._opening = asyncio.Lock()
        self._provision: Provision | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _opened(self) -> "Provision":
        async with self._opening:
            if self._provision is None:
                from services.weights.provision import Provision

                self._provision = await self._stack.enter_async_context(Provision(self._settings))
            return self._provision

    @contextlib.asynccontextmanager
    async def folder(self, weights: AnnotatorWeights, report: OnProgress = ignore_progress) -> AsyncIterator[Path]:
        async with contextlib.AsyncExitStack() as held:
            try:
                folder = await held.enter_async_context((await self._opened()).obtain(weights.entry, report=report))
                if missing := weights.missing_files(folder):
                    where = weights.manifest.view
                    raise FailedPrecondition(f"{', '.join(missing)} not found in {where}", field="annotator")
            except FanlightError as error:
                raise _about(weights, error) from error
            yield folder


def _about(weights: AnnotatorWeights, error: FanlightError) -> FanlightError:
    """The request names an annotator and no weights, so a problem with the weights is never the request's fault."""
    kind = NodeFault if error.is_request_fault else type(error)
    return kind(
        f"{weights.name} needs {weights.describe_files()}: {error.message}",
        field="annotator",
        retry_after_s=error.retry_after_s,
    ).of_part(error.part)
