"""The preprocessor's settings: `FANLIGHT_PREPROCESSOR_*`."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kernel.config import Address
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

    def picture_limits(self) -> PictureLimits:
        return PictureLimits(
            size_bytes=self.max_picture_bytes, pixels=self.max_picture_pixels, side_px=self.max_picture_side_px
        )
