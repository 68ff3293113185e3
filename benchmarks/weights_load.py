"""Disk to tensors, cold: our reader against diffusers' from_pretrained on the same files, a UNet and a whole pipeline.

Random fp16 weights in the shapes of SD 1.5 (`--small`: a fifth as wide). All end with every page touched; the page
cache is dropped for all files before each round, and the share of it that stayed is reported; they take turns, in one
process that has imported everything. `the disk alone` reads the UNet's file past the page cache with 16 requests at a
time and makes nothing of it: nothing can be quicker. The median of the rounds counts, with their range.
As root also with the disk's read-ahead at Linux's default of 128 kB, put back afterwards.
Run: `python -m benchmarks.weights_load [--small] [--rounds 5] [--keep FOLDER]`.
"""

import contextlib
import ctypes
import gc
import logging
import mmap
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks.figures import RATIO, Report, arguments, in_turns
from benchmarks.models import Size, make_pipeline
from services.diffusion.models.loading import LoadTarget, load_text, load_unet, load_vae
from services.diffusion.models.scan import scan
from services.weights.loading import load_safetensors

PAGE_BYTES = 4096
HUGE_BYTES = 2 * 1024 * 1024
DIRECT_BYTES = 1024 * 1024
REQUESTS = 16
DEFAULT_READ_AHEAD_KB = 128
GOAL = 0.45

Load = Callable[[Path], list[torch.Tensor]]


def _make(root: Path, *, size: Size) -> Path:
    folder = root / "model"
    if not folder.exists():
        pipeline = make_pipeline(folder, size=size, seed=0)
        pipeline.to(dtype=torch.float16)
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _weights(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def _alone(folder: Path) -> list[torch.Tensor]:
    size = _weights(folder).stat().st_size
    fd = os.open(_weights(folder), os.O_RDONLY | os.O_DIRECT)

    def read(number: int) -> None:
        # Within one huge page, so that a request is one piece of memory.
        buffer = mmap.mmap(-1, 2 * HUGE_BYTES)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        skip = -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % HUGE_BYTES
        into = memoryview(buffer)[skip : skip + DIRECT_BYTES]
        for at in range(number * DIRECT_BYTES, size, REQUESTS * DIRECT_BYTES):
            os.preadv(fd, [into], at)

    with ThreadPoolExecutor(REQUESTS) as threads:
        list(threads.map(read, range(REQUESTS)))
    os.close(fd)
    return []


def _tensors(folder: Path) -> list[torch.Tensor]:
    return list(load_safetensors(_weights(folder)).values())


def _our_unet(folder: Path) -> list[torch.Tensor]:
    # The file is read while the module is built.
    tensors = load_safetensors(_weights(folder))
    config = UNet2DConditionModel.load_config(folder / "unet")
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    model.load_state_dict(tensors, assign=True)
    return list(model.parameters())


def _their_unet(folder: Path) -> list[torch.Tensor]:
    return list(UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float16).parameters())


def _our_pipeline(folder: Path) -> list[torch.Tensor]:
    entry, room = scan([folder]).default(), LoadTarget(dtype=torch.float16)
    models = (load_unet(entry, room), load_vae(entry, room), load_text(entry, entry.recipe.texts[0], room))
    return _parameters(*models)


def _their_pipeline(folder: Path) -> list[torch.Tensor]:
    made = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    return _parameters(made.unet, made.vae, made.text_encoder)


def _parameters(*models: Any) -> list[torch.Tensor]:
    return [parameter for model in models for parameter in model.parameters()]


def _drop_cache(folder: Path) -> None:
    # What is still mapped would stay.
    gc.collect()
    for path in (p for p in folder.rglob("*") if p.is_file()):
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _share_cached(path: Path) -> float:
    """How much of a file is in memory, as mincore says."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // PAGE_BYTES))()
        anchor = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), pages) == 0
        del anchor
    return sum(page & 1 for page in pages) / len(pages)


def _touch(tensors: list[torch.Tensor]) -> int:
    """Read one value of every page, as a copy to a device would."""
    total = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(torch.uint8).flatten()
        total += int(raw[::PAGE_BYTES].sum())
    return total


def _timed(load: Load, folder: Path) -> float:
    _drop_cache(folder)
    begin_s = time.perf_counter()
    _touch(load(folder))
    return time.perf_counter() - begin_s


# Each with whom it is compared to.
WAYS: dict[str, tuple[Load, str]] = {
    "the disk alone": (_alone, "UNet"),
    "our tensors": (_tensors, "UNet"),
    "our tensors in a UNet": (_our_unet, "UNet"),
    "UNet2DConditionModel.from_pretrained": (_their_unet, "UNet"),
    "our pipeline's models": (_our_pipeline, "pipeline"),
    "StableDiffusionPipeline.from_pretrained": (_their_pipeline, "pipeline"),
}
PEERS = {"UNet": "UNet2DConditionModel.from_pretrained", "pipeline": "StableDiffusionPipeline.from_pretrained"}


def _read_ahead_file(folder: Path) -> Path:
    device = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    found = block / "queue" / "read_ahead_kb"
    return found if found.exists() else block.parent / "queue" / "read_ahead_kb"


@contextlib.contextmanager
def _read_ahead(file: Path, kilobytes: int) -> Iterator[None]:
    before = file.read_text()
    file.write_text(str(kilobytes))
    try:
        yield
    finally:
        file.write_text(before)


def measure(folder: Path, rounds: int, how: str, report: Report, *, goal: float | None) -> None:
    for load, _ in WAYS.values():
        _timed(load, folder)
    _drop_cache(folder)
    stayed = _share_cached(_weights(folder))
    print(f"{how}: {rounds} rounds in turns; {stayed:.1%} of the file stayed in memory")
    times = in_turns(rounds, *(partial(_timed, load, folder) for load, _ in WAYS.values()))
    taken = dict(zip(WAYS, times, strict=True))
    for name, (_, peer) in WAYS.items():
        report.add(name, taken[name], "s", column=f"s, {how}")
        if name not in PEERS.values():
            ratios = [mine / other for mine, other in zip(taken[name], taken[PEERS[peer]], strict=True)]
            own_goal = goal if name.startswith("our") else None
            report.add(name, ratios, RATIO, column=f"of `from_pretrained`'s, {how}", goal=own_goal)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a folder for the model, used again where it has it")
    asked = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    for each in (diffusers_logging, transformers_logging):
        each.disable_progress_bar()
    size: Size = "tiny" if asked.smoke else "small" if asked.small else "full"
    report, rounds, goal = Report(), 1 if asked.smoke else asked.rounds, GOAL if size == "full" else None
    with tempfile.TemporaryDirectory() as name:
        folder = _make(asked.keep or Path(name), size=size)
        file = _read_ahead_file(folder)
        now = f"read-ahead {file.read_text().strip()} kB" if file.exists() else "as the machine is"
        measure(folder, rounds, now, report, goal=goal)
        if file.exists() and os.access(file, os.W_OK) and not asked.smoke:
            with _read_ahead(file, DEFAULT_READ_AHEAD_KB):
                measure(folder, rounds, f"read-ahead {DEFAULT_READ_AHEAD_KB} kB, Linux's default", report, goal=goal)
        else:
            print(f"skipped: read-ahead of {DEFAULT_READ_AHEAD_KB} kB, only root may set it")
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
