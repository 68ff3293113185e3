"""What of weights an annotator needs to say and to ask for. Knows no network library and no store's inside."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from fanlight.errors import FailedPrecondition, FanlightError, NodeFault
from services.preprocessor.device import CPU, Device
from services.weights.settings import WeightsSettings

if TYPE_CHECKING:
    from services.weights.manifest import Manifest
    from services.weights.provision import Provision
    from services.weights.targets import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A network with its weights. Annotators that name the same one share it."""

    name: str
    # An entry of the weights' catalog.
    entry: str
    # From the folder of its files to what `Annotator.apply` takes as its model.
    build: Callable[[Path, Device], Any]
    # Runs on the GPU where there is one; else on the CPU everywhere.
    uses_gpu: bool = True

    def device(self, found: Device) -> Device:
        """On what it runs on a node with the device found."""
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


@cache
def _manifest(entry: str) -> "Manifest":
    # Read when weights are asked for; a process that needs none is ready sooner.
    from services.weights.catalog import shipped

    return shipped().require(entry)


# Told how a download stands.
Tell = Callable[["Progress"], None]


def tell_nobody(progress: "Progress") -> None:
    """For those who do not wait to see it."""


class Weights(Protocol):
    def folder(self, model: Model, tell: Tell = ...) -> contextlib.AbstractAsyncContextManager[Path]:
        """The folder with the model's files, there for as long as this is open. FanlightError says what is missing."""
        ...


class FolderWeights:
    """Files that somebody laid down as AUTHOR/NAME/FILE, such as in a container's image; else whatever `beyond` has."""

    def __init__(self, root: Path | None, beyond: Weights) -> None:
        self._root = root
        self._beyond = beyond

    @contextlib.asynccontextmanager
    async def folder(self, model: Model, tell: Tell = tell_nobody) -> AsyncIterator[Path]:
        if self._root is not None and not _missing(self._root / model.manifest.view, model):
            yield self._root / model.manifest.view
            return
        async with self._beyond.folder(model, tell) as path:
            yield path


class StoreWeights:
    """From the weights' store, fetched by its plan where they are not held. Use as an async context manager.

    What fetches is imported when something is asked for: a process that needs no weights is ready sooner.
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
    async def folder(self, model: Model, tell: Tell = tell_nobody) -> AsyncIterator[Path]:
        try:
            async with (await self._opened()).obtain(model.entry, report=tell) as folder:
                yield _whole(folder, model)
        except FanlightError as error:
            # The request names an annotator and no weights: what is wrong with them is never its fault.
            kind = NodeFault if error.is_request_fault else type(error)
            raise kind(
                f"{model.name} needs {told(model)}: {error.message}",
                field="annotator",
                retry_after_s=error.retry_after_s,
            ) from error


def told(model: Model) -> str:
    """Its files and where they come from, for people."""
    sources = [file.sources[0] if file.sources else model.manifest.view for file in model.manifest.files]
    return ", ".join(f"{name} from {source}" for name, source in zip(model.files, sources, strict=True))


def _missing(folder: Path, model: Model) -> list[str]:
    return [name for name in model.files if not (folder / name).is_file()]


def _whole(folder: Path, model: Model) -> Path:
    if missing := _missing(folder, model):
        raise FailedPrecondition(f"{', '.join(missing)} not found in {model.manifest.view}", field="annotator")
    return folder
