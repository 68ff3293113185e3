"""On what networks run, found out without loading a network library."""

from dataclasses import dataclass
from importlib import metadata

from services.kernel import gpus

AUTO, CPU, CUDA = "auto", "cpu", "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """`kind` is cpu or cuda; `threads` is how many a CPU's networks spread over."""

    kind: str = CPU
    threads: int = 2

    @property
    def is_half(self) -> bool:
        """Whether networks run in half precision."""
        return self.kind == CUDA

    @property
    def dtype(self) -> str:
        return "float16" if self.is_half else "float32"

    @property
    def label(self) -> str:
        """What a network's output depends on, part of the cache key."""
        return f"{self.kind}/{self.dtype}"


# What annotators without a network run on, wherever they are.
PLAIN_LABEL = "cpu/uint8"


def find_device(wish: str, *, threads: int) -> Device:
    """The wished one; `auto` takes the GPU where the driver has one and the installed torch was built for it."""
    kind = (CUDA if _torch_has_cuda() and gpus.count() > 0 else CPU) if wish == AUTO else wish
    return Device(kind=kind, threads=threads)


def _torch_has_cuda() -> bool:
    try:
        return "cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
