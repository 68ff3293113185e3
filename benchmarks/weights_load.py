"""Disk to tensors, cold: our reader, alone and into a UNet, against diffusers' from_pretrained on the same file.

Random fp16 weights in the shape of SD 1.5's UNet (`--channels 320`). All end with every page touched; the page cache
is dropped for the file before each round; they take turns. `the disk alone` asks the kernel for the file in one piece
and makes nothing of it: nobody can be quicker. Prints the least of the rounds, as machines are busy.
Run: `python -m benchmarks.weights_load [--channels 320] [--rounds 3]`.
"""

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from services.weights.loading import load_safetensors
from services.weights.readahead import read_ahead

PAGE_BYTES = 4096


def _make(folder: Path, channels: int) -> None:
    widths = (channels, 2 * channels, 4 * channels, 4 * channels)
    with torch.device("meta"):
        model = UNet2DConditionModel(
            cross_attention_dim=768, block_out_channels=widths, attention_head_dim=8, sample_size=64
        )
    model = model.to(torch.float16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(torch.int16).random_(0, 0x3C00)
    model.save_pretrained(folder)


def _alone(folder: Path) -> list[torch.Tensor]:
    with _weights(folder).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    thread = read_ahead(mapped, 0, len(mapped))
    if thread:
        thread.join()
    return []


def _tensors(folder: Path) -> list[torch.Tensor]:
    return list(load_safetensors(_weights(folder)).values())


def _ours(folder: Path) -> list[torch.Tensor]:
    # The file is read while the module is built.
    tensors = load_safetensors(_weights(folder))
    config = UNet2DConditionModel.load_config(folder)
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    model.load_state_dict(tensors, assign=True)
    return list(model.parameters())


def _theirs(folder: Path) -> list[torch.Tensor]:
    return list(UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16).parameters())


def _weights(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def _drop_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _touch(tensors: list[torch.Tensor]) -> int:
    """Read one value of every page, as a copy to a device would."""
    total = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(torch.uint8).flatten()
        total += int(raw[::PAGE_BYTES].sum())
    return total


def _timed(load: Callable[[Path], list[torch.Tensor]], folder: Path) -> float:
    _drop_cache(_weights(folder))
    begin_s = time.perf_counter()
    _touch(load(folder))
    return time.perf_counter() - begin_s


THEIRS = "diffusers' from_pretrained"
WAYS = {"the disk alone": _alone, "our tensors": _tensors, "our tensors in a UNet": _ours, THEIRS: _theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make(folder, arguments.channels)
        size = _weights(folder).stat().st_size
        for load in WAYS.values():
            _timed(load, folder)
        rounds = [[_timed(load, folder) for load in WAYS.values()] for _ in range(arguments.rounds)]
    least = dict(zip(WAYS, (min(times) for times in zip(*rounds, strict=True)), strict=True))
    print(f"{size:,} bytes, least of {arguments.rounds} rounds that took turns")
    print("| what | seconds | of from_pretrained's |")
    print("|---|---|---|")
    for name, took_s in least.items():
        print(f"| {name} | {took_s:.2f} | {took_s / least[THEIRS]:.2f} |")


if __name__ == "__main__":
    main()
