"""The settings, `FANLIGHT_PREPROCESSOR_*`, and the device that networks run on. Imports no network library."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kernel.config import Address, SettingsError
from services.kernel.images import ImageLimits
from services.kernel.process import check_device, count_gpus

# CPU threads of OpenCV for one image, and of one network. Not derived from the number of cores: in a container, a
# process often sees the cores of the host.
OPENCV_THREADS = 2
MODEL_THREADS = 2
# How many direct calls may wait for a slot.
WAITING_LIMIT = 32

AUTO, CPU, CUDA = "auto", "cpu", "cuda"


class PreprocessorSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_PREPROCESSOR_", extra="ignore", frozen=True)

    grpc: Address = Field("127.0.0.1:50052", description="HOST:PORT of the gRPC service for direct calls.")
    slots: int = Field(2, ge=1, le=256, description="How many images are annotated at the same time.")
    max_image_bytes: int = Field(
        ImageLimits().size_bytes, ge=1, description="The largest encoded image that is accepted, in bytes."
    )
    max_image_pixels: int = Field(
        ImageLimits().pixels,
        ge=1,
        description="The most pixels of an image or control image; some annotators need 30 bytes of memory per pixel.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where networks run; auto uses the GPU if there is one."
    )
    resident_bytes: int = Field(
        6_000_000_000,
        ge=0,
        description="How many bytes of weights stay in memory; the least recently used are evicted, never one in use.",
    )
    models_dir: Path | None = Field(
        None, description="A folder AUTHOR/NAME/FILE with annotators' weights; it is searched before the store."
    )

    def check(self) -> None:
        """SettingsError if the named device or folder does not exist."""
        check_device(self.device, setting="FANLIGHT_PREPROCESSOR_DEVICE")
        if self.models_dir is not None and not self.models_dir.is_dir():
            raise SettingsError(f"FANLIGHT_PREPROCESSOR_MODELS_DIR: {self.models_dir} is not a folder")

    def image_limits(self) -> ImageLimits:
        return ImageLimits(size_bytes=self.max_image_bytes, pixels=self.max_image_pixels)


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
