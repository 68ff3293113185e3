"""The diffusion service's settings: `FANLIGHT_DIFFUSION_*`."""

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.diffusion.engine.generation import Safety
from services.diffusion.models.precision import AUTO
from services.diffusion.supply import FetchMode
from services.kernel.config import Address, SettingsError

# How many direct calls may wait for a slot.
WAITING_LIMIT = 64
# After how long images that fit the running batch queue behind others that wait.
HOLD_LIMIT_S = 20.0


class DiffusionSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_DIFFUSION_", extra="ignore", frozen=True)

    grpc: Address = Field("127.0.0.1:50053", description="HOST:PORT where direct calls are answered.")
    models: str = Field(
        "",
        description="Folders of models in diffusers' layout, or folders of such folders, separated as in PATH."
        " Empty: the model that ships with Fanlight.",
    )
    default_model: str = Field(
        "", description="The checkpoint for requests that name none. Empty: the first one found."
    )
    preload: bool = Field(True, description="Load the default checkpoint at the start, not at the first request.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    precision: str = Field(
        AUTO,
        pattern=r"^(auto|float32|float16|bfloat16)$",
        description="What models compute in: float32, float16 or bfloat16. auto: bfloat16 on cards from Ampere on,"
        " float32 on GTX 16xx, cards without half precision and CPUs, float16 on others.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads that torch computes with. 0: one for small models, one per core for others.",
    )
    slots: int = Field(4, ge=1, le=64, description="How many images are generated at a time, as one batch if they fit.")
    fetch: FetchMode = Field(
        FetchMode.CATALOG,
        description="Which models a request may cause to be downloaded: off, catalog (those that `fanlight weights` "
        "lists), or any reference.",
    )
    ram_bytes: int = Field(
        0, ge=0, description="Bytes of models that are cached in RAM. 0: a part of the machine's memory."
    )
    vram_bytes: int = Field(0, ge=0, description="Bytes of models that are cached on a GPU. 0: a part of its memory.")
    safety_checker: Safety = Field(
        Safety.OFF,
        description="The default for requests: off, flag, blur or block. Its model is loaded only when on.",
    )
    safety_checker_folder: Path | None = Field(
        None,
        description="The safety checker in diffusers' layout, with safetensors. Empty: the catalog's, which is fetched"
        " when a request first needs it, unless fetching is off.",
    )
    max_pixels: int = Field(1024 * 1024, ge=1, description="The most pixels that a generated image may have.")

    def folders(self) -> Sequence[Path]:
        """Where models are; empty: only the starter model. SettingsError for a folder that does not exist."""
        folders = [Path(name) for name in self.models.split(os.pathsep) if name]
        for folder in folders:
            if not folder.is_dir():
                raise SettingsError(f"FANLIGHT_DIFFUSION_MODELS: {folder} is not a folder")
        return folders
