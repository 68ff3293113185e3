"""Disk to tensors, cold: our reader into a UNet against diffusers' from_pretrained on the same file.

Random weights in the shape of SD 1.5's UNet (`--channels 320`), in fp16. Both end with every byte touched; the page
cache is dropped for the file before each round; the two take turns. Prints the least of the rounds, as machines are
busy. Run: `python -m benchmarks.weights_load [--channels 320] [--rounds 3]`.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from services.weights.loading import load_safetensors

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


def _ours(folder: Path) -> torch.nn.Module:
    config = UNet2DConditionModel.load_config(folder)
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    model.load_state_dict(load_safetensors(_weights(folder)), assign=True)
    return model


def _theirs(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
    return model


def _weights(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def _drop_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _touch(model: torch.nn.Module) -> int:
    """Read one value of every page, as a copy to a device would."""
    total = 0
    for parameter in model.parameters():
        raw = parameter.detach().contiguous().view(torch.uint8).flatten()
        total += int(raw[::PAGE_BYTES].sum())
    return total


def _timed(load: Callable[[Path], torch.nn.Module], folder: Path) -> float:
    _drop_cache(_weights(folder))
    begin_s = time.perf_counter()
    _touch(load(folder))
    return time.perf_counter() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make(folder, arguments.channels)
        size = _weights(folder).stat().st_size
        _timed(_ours, folder), _timed(_theirs, folder)
        rounds = [(_timed(_ours, folder), _timed(_theirs, folder)) for _ in range(arguments.rounds)]
    ours, theirs = (min(side) for side in zip(*rounds, strict=True))
    print(f"{size:,} bytes, least of {arguments.rounds} rounds that took turns")
    print(f"ours {ours:.2f} s, diffusers {theirs:.2f} s, ratio {ours / theirs:.3f} (at most 0.45)")


if __name__ == "__main__":
    main()
