"""What tells one state of a model's files from another, and what painting needs beside the models. Loads no torch."""

from pathlib import Path

from services.diffusion.generation import Generation

# What an evaluation needs beside the weights, in numbers a latent pixel and channel of the UNet's first layer. SD's own
# shapes have 26 alive at a time, SDXL's 16; the rest is for ControlNets' residuals and for libraries' workspaces.
UNET_NUMBERS = 40
# What the VAE needs, in numbers a pixel and channel of its second level, where it has the most, 3 of them alive.
VAE_NUMBERS = 4
# Where memory is short the VAE works in tiles of this size, for SDXL's too, whose own idea of a tile is twice as wide.
TILE_SIDE_PX = 512


def mark(path: Path, part: str) -> object:
    """Changes when the files of a part do: a file that was replaced is loaded anew."""
    folder = path / part if part and (path / part).is_dir() else path
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    try:
        return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    except FileNotFoundError:
        return ()


def work_bytes(generation: Generation, number_bytes: int) -> int:
    """About the least that one picture needs beside the weights. `number_bytes`: of one number on the device."""
    shape, vae = generation.checkpoint.shape, generation.checkpoint.recipe.vae
    pixels = generation.width_px * generation.height_px
    halves = 2 if generation.is_guided else 1
    unet = pixels // shape.latent_factor**2 * shape.block_out_channels[0] * UNET_NUMBERS * halves * number_bytes
    channels = int(list(vae["block_out_channels"])[:2][-1])
    vae_number_bytes = 4 if vae.get("force_upcast") else number_bytes
    return max(unet, min(pixels, TILE_SIDE_PX**2) * channels * VAE_NUMBERS * vae_number_bytes)
