"""The preprocessor's settings: `FANLIGHT_PREPROCESSOR_*`."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kernel.config import Address, SettingsError
from services.kernel.gpus import check_device
from services.kernel.pictures import PictureLimits

# OpenCV counts pixels in 16 bits where it moves them around.
OPENCV_SIDE_MAX_PX = 32_766


class PreprocessorSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_PREPROCESSOR_", extra="ignore", frozen=True)

    grpc: Address = Field("127.0.0.1:50052", description="HOST:PORT where direct calls are answered.")
    slots: int = Field(2, ge=1, le=256, description="How many pictures are annotated at a time.")
    waiting_limit: int = Field(32, ge=0, description="How many direct calls may wait for a slot.")
    opencv_threads: int = Field(2, ge=1, le=256, description="How many threads OpenCV spreads one picture over.")
    max_picture_bytes: int = Field(
        PictureLimits().size_bytes, ge=1, description="The largest encoded picture that is taken."
    )
    max_picture_pixels: int = Field(
        PictureLimits().pixels,
        ge=1,
        description="The most pixels a picture or control image has; some annotators need 30 bytes for each.",
    )
    max_picture_side_px: int = Field(
        PictureLimits().side_px, ge=1, le=OPENCV_SIDE_MAX_PX, description="The longest side in pixels."
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where networks run; auto takes the GPU if there is one."
    )
    model_threads: int = Field(2, ge=1, le=256, description="How many threads a network spreads over on a CPU.")
    resident_bytes: int = Field(
        6_000_000_000, ge=0, description="Weights kept in memory; the least recently used go first, never one in use."
    )
    batch_limit: int = Field(
        4, ge=1, le=64, description="How many pictures of one shape share a network's run on a GPU."
    )
    annotations_limit: int = Field(
        32, ge=1, le=256, description="The most annotations of one picture that one call asks for."
    )
    models_dir: Path | None = Field(
        None, description="A folder AUTHOR/NAME/FILE of annotators' weights that is looked in before the store."
    )

    def check(self) -> None:
        """SettingsError where a device or a folder that is named is not there."""
        check_device(self.device, setting="FANLIGHT_PREPROCESSOR_DEVICE")
        if self.models_dir is not None and not self.models_dir.is_dir():
            raise SettingsError(f"FANLIGHT_PREPROCESSOR_MODELS_DIR: {self.models_dir} is not a folder")

    def picture_limits(self) -> PictureLimits:
        return PictureLimits(
            size_bytes=self.max_picture_bytes, pixels=self.max_picture_pixels, side_px=self.max_picture_side_px
        )
