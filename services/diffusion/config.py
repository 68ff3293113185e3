"""The diffusion service's settings: `FANLIGHT_DIFFUSION_*`."""

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.diffusion.generation import Safety
from services.diffusion.remote import Fetch
from services.kernel.config import Address, SettingsError
from services.kernel.pictures import PictureLimits


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
    preload: bool = Field(True, description="Load the default checkpoint when started, not when first asked for.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads that torch computes with. 0: one for small models, one a core for others.",
    )
    slots: int = Field(4, ge=1, le=64, description="How many pictures are painted at a time, as one batch if they fit.")
    waiting_limit: int = Field(64, ge=0, description="How many direct calls may wait for a slot.")
    hold_limit_s: float = Field(
        20.0, ge=0, description="After how long pictures that fit the running batch queue up behind others that wait."
    )
    fetch: Fetch = Field(
        Fetch.CATALOG,
        description="Which models requests may have fetched: off, catalog (what `fanlight weights` knows by name), or"
        " any reference.",
    )
    ram_bytes: int = Field(
        0, ge=0, description="The most bytes of models that stay in RAM. 0: a part of what the machine has."
    )
    vram_bytes: int = Field(
        0, ge=0, description="The most bytes of models that stay on a GPU. 0: a part of what it has."
    )
    safety_checker: Safety = Field(
        Safety.OFF,
        description="For requests that do not say: off, flag, blur or block. Its model is loaded only when on.",
    )
    safety_checker_folder: Path | None = Field(
        None, description="The safety checker in diffusers' layout, with safetensors. Empty: there is none."
    )
    max_pixels: int = Field(1024 * 1024, ge=1, description="The most pixels that a picture may have.")
    max_picture_bytes: int = Field(
        PictureLimits().size_bytes, ge=1, description="The largest encoded control image that is taken."
    )
    max_picture_pixels: int = Field(PictureLimits().pixels, ge=1, description="The most pixels of a control image.")

    def folders(self) -> Sequence[Path]:
        """Where models lie; none: only the starter model. SettingsError for one that is not there."""
        folders = [Path(name) for name in self.models.split(os.pathsep) if name]
        for folder in folders:
            if not folder.is_dir():
                raise SettingsError(f"FANLIGHT_DIFFUSION_MODELS: {folder} is not a folder")
        return folders

    def picture_limits(self) -> PictureLimits:
        return PictureLimits(size_bytes=self.max_picture_bytes, pixels=self.max_picture_pixels)
