"""Out of memory on the device: release and retry, then smaller batches, then an error; and how much an image needs."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from fanlight.errors import ResourceExhausted, TooLarge
from services.diffusion.engine.generation import Generation
from services.diffusion.models.device import DeviceOutOfMemory, translate_oom
from services.diffusion.models.faults import part_of_device

# What an evaluation needs beside the weights, in numbers for each latent pixel and channel of the UNet's first layer.
# SD's own shapes have 26 alive at a time, SDXL's 16; the rest is for ControlNets' residuals and libraries' workspaces.
UNET_NUMBERS = 40
# What the VAE needs, in numbers for each pixel and channel of its second level, which has the most, 3 of them alive.
VAE_NUMBERS = 4
# The tiles in which the VAE works where memory is short, for SDXL too, whose config has tiles twice as wide.
TILE_SIDE_PX = 512
Result = TypeVar("Result")


class OomRetry:
    """For the device thread."""

    def __init__(self, release: Callable[[], None]) -> None:
        """`release` drops from the device what no running image uses."""
        self._release = release
        self._key: Hashable = None
        self._rows_limit = 0

    def retry_after_release(self, work: Callable[[], Result], what: str, *, field: str = "width_px") -> Result:
        """Do the work; if out of memory, release and try once more. ResourceExhausted: the device "cannot `what`"."""
        try:
            with translate_oom():
                return work()
        except DeviceOutOfMemory:
            self._release()
        try:
            with translate_oom():
                return work()
        except DeviceOutOfMemory as error:
            raise out_of_memory_error(what, field=field) from error

    def release(self) -> None:
        self._release()

    def rows_limit(self, key: Hashable) -> int:
        """How many rows of this kind were found to fit in one batch; 0 where that is not known."""
        return self._rows_limit if key == self._key else 0

    def learn(self, key: Hashable, rows_limit: int) -> None:
        """Kept until rows of another kind run out of memory, so that not every evaluation fails first."""
        self._key, self._rows_limit = key, rows_limit


class ImageTooLarge(ResourceExhausted):
    """The device has no memory for an image of this size: neither the device's fault nor the checkpoint's."""

    reason = TooLarge.reason


def with_culprit(error: ResourceExhausted, generation: Generation, device: str) -> ResourceExhausted:
    """The error with what explains it: the size, where that is more than the checkpoint was made for; else the device.

    `device`: its name. A part that is named already stays.
    """
    checkpoint = generation.checkpoint
    if error.part:
        return error
    if generation.width_px * generation.height_px > checkpoint.width_px * checkpoint.height_px:
        return ImageTooLarge(error.message, field=error.field, retry_after_s=error.retry_after_s)
    return error.of_part(part_of_device(device))


def out_of_memory_error(what: str, *, field: str = "width_px") -> ResourceExhausted:
    return ResourceExhausted(f"the device is out of memory: it cannot {what}", field=field)


def vram_estimate_bytes(generation: Generation, number_bytes: int) -> int:
    """About the least that one image needs beside the models. `number_bytes`: of one number on the device."""
    shape, vae = generation.checkpoint.shape, generation.checkpoint.recipe.vae
    pixels = generation.width_px * generation.height_px
    unet = (
        pixels
        // shape.latent_factor**2
        * shape.block_out_channels[0]
        * UNET_NUMBERS
        * generation.predictions
        * number_bytes
    )
    channels = int(list(vae["block_out_channels"])[:2][-1])
    vae_number_bytes = 4 if vae.get("force_upcast") else number_bytes
    return max(unet, min(pixels, TILE_SIDE_PX**2) * channels * VAE_NUMBERS * vae_number_bytes)
