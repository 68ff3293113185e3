"""Which device the networks run on, found without importing a network library."""

from dataclasses import dataclass
from importlib import metadata

from services.kernel.process import count_gpus

AUTO, CPU, CUDA = "auto", "cpu", "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorDevice:
    """`kind` is cpu or cuda; `threads` is how many CPU threads one network uses."""

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
        """Kind and precision, which a network's output depends on; part of the control-image cache's key."""
        return f"{self.kind}/{self.dtype}"


# The label of annotators without a network: they compute in integers on the CPU of any node.
CORE_LABEL = "cpu/uint8"


def find_device(choice: str, *, threads: int) -> AnnotatorDevice:
    """`choice` itself; `auto` is the GPU if the driver reports one and the installed torch was built for CUDA."""
    kind = (CUDA if _torch_has_cuda() and count_gpus() > 0 else CPU) if choice == AUTO else choice
    return AnnotatorDevice(kind=kind, threads=threads)


def _torch_has_cuda() -> bool:
    try:
        return "cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
