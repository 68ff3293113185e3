"""What tells one state of a model's files from another, and what painting needs beside the models. Loads no torch."""

from pathlib import Path

from services.diffusion.generation import Generation

# What an evaluation needs beside the weights, in numbers a latent pixel and channel of the UNet's first layer: an
# estimate from the layers' shapes, on the safe side. A batch that finds too little after all is run in halves.
WORK_NUMBERS = 40


def mark(path: Path, part: str) -> object:
    """Changes when the files of a part do: a file that was replaced is loaded anew."""
    folder = path / part if part and (path / part).is_dir() else path
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    try:
        return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    except FileNotFoundError:
        return ()


def work_bytes(generation: Generation, number_bytes: int) -> int:
    """An estimate of what one picture needs beside the weights. `number_bytes`: of one number on the device."""
    shape = generation.checkpoint.shape
    pixels = generation.width_px * generation.height_px // shape.latent_factor**2
    halves = 2 if generation.is_guided else 1
    return pixels * shape.block_out_channels[0] * WORK_NUMBERS * halves * number_bytes
