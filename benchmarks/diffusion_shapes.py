"""SD 1.5's own shapes with random weights: mixed requests on a CPU, and pictures a second and memory on a GPU.

Both sides paint from one folder, and diffusers' pipeline is used as its documentation shows it.
"""

import asyncio
import contextlib
import io
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

from benchmarks.models import filled, make_pipeline
from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.abilities import Abilities
from services.diffusion.digests import WeightDigests
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.studio import TorchStudio
from services.diffusion.engine.thread import DeviceThread
from services.diffusion.generation import Generation
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.library import Library
from services.diffusion.models.scan import scan
from services.diffusion.models.shadow import doubled
from services.diffusion.painter import Painter
from services.diffusion.parse.parser import Parser
from services.kernel.pictures import PictureLimits
from tests.fakes.device import FakeGpu
from tests.fakes.diffusers_reference import Reference

Request = diffusion_pb2.GenerateRequest

# Text2img in one batch and with guidance, otherwise as they come: by scheduler and steps.
MIXED = (
    ("ddim", 3),
    ("euler_a", 2),
    ("DPM++ 2M Karras", 3),
    ("euler", 2),
    ("ddim", 2),
    ("unipc", 3),
    ("euler_a", 3),
    ("DPM++ 2M Karras", 2),
)
MIXED_SIDE_PX = 256
STEPS = 20
BATCHES = (1, 4, 8)
NETS = 14
# What a card of 12 GB has for models, as the service reckons.
CARD_BYTES = 12 << 30
CARD_MODELS_BYTES = int(CARD_BYTES * 0.85)


def make_sd15(root: Path, *, nets: int, small: bool = False) -> None:
    """`sd15/model` and so many ControlNets, all in fp16; the nets' files are one file by many names."""
    folder = root / "sd15"
    if (folder / "model" / "model_index.json").exists():
        return
    pipeline = make_pipeline(folder / "model", small=small, seed=0).to(dtype=torch.float16)
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    with torch.device("meta"):
        empty = ControlNetModel.from_unet(pipeline.unet, load_weights_from_unet=False)
    filled(empty).half().save_pretrained(folder / "controlnet-net0", safe_serialization=True)
    for number in range(1, nets):
        other = folder / f"controlnet-net{number}"
        other.mkdir()
        for file in (folder / "controlnet-net0").iterdir():
            os.link(file, other / file.name)


def parser_of(catalogue: Catalogue) -> Parser:
    abilities = Abilities(pixels_limit=2**20, has_safety_checker=False)
    return Parser(catalogue=catalogue, abilities=abilities, picture_limits=PictureLimits(), random_seed=lambda: 1)


@contextlib.contextmanager
def painting(library: Library, parser: Parser, *, threads: int) -> Iterator[Callable[[Sequence[Request]], None]]:
    """What paints requests all at once, each to a PNG."""
    thread, codecs = DeviceThread(), ThreadPoolExecutor(2)
    studio = TorchStudio(library, threads=threads)
    with asyncio.Runner() as runner:

        async def started() -> tuple[Painter, asyncio.Task[None]]:
            engine = Engine(lambda: studio, thread=thread, rows_limit=8, hold_limit_s=20.0, clock=time.monotonic)
            painter = Painter(engine, parser, codecs=codecs, digests=WeightDigests(), clock=time.monotonic)
            return painter, asyncio.create_task(engine.run())

        painter, running = runner.run(started())

        async def all_at_once(requests: Sequence[Request]) -> None:
            parsed = [await painter.parse(request) for request in requests]
            await asyncio.gather(*(painter.paint(generation, lambda progress: None) for generation in parsed))

        yield lambda requests: runner.run(all_at_once(requests))
        running.cancel()
    thread.close()
    codecs.shutdown()


def quiet() -> None:
    """No log of ours, no warning of theirs."""
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def shapes(rounds: int, keep: Path | None, *, small: bool = False) -> None:
    """CPU seconds for MIXED, ours at once and diffusers' one after another, in float32."""
    torch.set_num_threads(1)
    with _folder(keep) as root:
        make_sd15(root, nets=1, small=small)
        parser, reference = parser_of(scan([root])), Reference(root / "sd15")
        requests = [
            Request(prompt=f"an apple number {seed}", seed=seed, scheduler=name, steps=steps, **_sides(MIXED_SIDE_PX))
            for seed, (name, steps) in enumerate(MIXED)
        ]

        def theirs(parsed: Sequence[Generation]) -> None:
            for generation in parsed:
                _save(reference.pixels(generation))

        with painting(Library(device="cpu"), parser, threads=1) as ours:
            short = Request(prompt="warm", steps=1, **_sides(64))
            ours([short])
            theirs([parser.parse(short)])
            works = (lambda: ours(requests), lambda: theirs([parser.parse(each) for each in requests]))
            times = [[_cpu_s(work) for work in works] for _ in range(rounds)]
    ours_s, theirs_s = (min(column) for column in zip(*times, strict=True))
    print(
        f"{len(MIXED)} mixed requests, SD 1.5 shapes, {MIXED_SIDE_PX} x {MIXED_SIDE_PX}: diffusers loop"
        f" {theirs_s:.1f} s CPU; Fanlight {ours_s:.1f} s; {theirs_s / ours_s:.2f}x (goal 1.0)"
    )


def gpu(rounds: int, keep: Path | None, *, device: str = "cuda", small: bool = False) -> None:
    """Pictures a second, 512 x 512, fp16, 20 steps; then the memory with 14 ControlNets in turns on a card of 12 GB."""
    is_cuda = device.startswith("cuda")
    if is_cuda and not torch.cuda.is_available():
        print("skipped: torch finds no CUDA device on this machine; nothing was measured")
        return
    side_px, steps = (64, 2) if small else (512, STEPS)
    with _folder(keep) as root:
        make_sd15(root, nets=NETS, small=small)
        parser = parser_of(scan([root]))
        for net in (False, True):
            for batch in BATCHES:
                requests = _requests(batch, side_px, steps, net="net0" if net else "")
                theirs_s = _theirs_s(root, rounds, batch, side_px, steps, device, with_net=net)
                with painting(Library(device=device), parser, threads=0) as ours:
                    ours(requests)
                    ours_s = min(_wall_s(lambda: ours(requests)) for _ in range(rounds))  # noqa: B023 - called at once
                _free(device)
                print(
                    f"batch {batch}, {'one ControlNet' if net else 'no ControlNet'}: Fanlight {batch / ours_s:.2f}"
                    f" pictures/s, diffusers {batch / theirs_s:.2f}; {theirs_s / ours_s:.2f}x (stretch 1.8)",
                    flush=True,
                )
        if is_cuda:
            _tell_memory(parser, device, side_px, steps)


def residency(keep: Path | None) -> None:
    """What residency holds on a card of 12 GB, counted without one: 14 ControlNets in turns, each copy a mere shape."""
    with _folder(keep) as root:
        make_sd15(root, nets=NETS)
        card = _Card(memory_bytes=CARD_MODELS_BYTES)
        library = Library(open_device=lambda wanted: card)
        parser, most_bytes, times = parser_of(scan([root])), 0, []
        for turn in range(3):
            for number in range(NETS):
                before = card.uploads
                library.assembled(parser.parse(_requests(1, 512, 1, net=f"net{number}")[0]))
                shelf: Any = library._opened
                most_bytes = max(most_bytes, shelf._vram.used_bytes)
                times += [card.uploads - before] if turn else []
    print(
        f"{NETS} ControlNets in turns, VRAM for models {CARD_MODELS_BYTES / 1e9:.1f} GB: at most"
        f" {most_bytes / 1e9:.2f} GB held; a change of net uploads {sum(times) / len(times):.2f} models from RAM"
    )


class _Card(FakeGpu):
    """Counts what lies on it."""

    dtype = torch.float16

    def uploaded(self, module: Any) -> Any:
        self.uploads += 1
        return doubled(module, lambda name, tensor: tensor.to("meta"))


def _tell_memory(parser: Parser, device: str, side_px: int, steps: int) -> None:
    """As on a card of 12 GB: torch gets no more, and models fill the share of that which the service gives them."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / torch.cuda.mem_get_info()[1]))
    torch.cuda.reset_peak_memory_stats()
    library = Library(device=device, vram_bytes=CARD_MODELS_BYTES)
    with painting(library, parser, threads=0) as ours:
        for number in [*range(NETS), *range(NETS)]:
            ours(_requests(1, side_px, steps, net=f"net{number}"))
    print(
        f"{NETS} ControlNets in turns, twice: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB allocated at most,"
        f" {torch.cuda.max_memory_reserved() / 1e9:.2f} GB reserved, of {CARD_BYTES / 1e9:.1f}"
    )


def _theirs_s(root: Path, rounds: int, batch: int, side_px: int, steps: int, device: str, *, with_net: bool) -> float:
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    folder = root / "sd15"
    if with_net:
        net = ControlNetModel.from_pretrained(folder / "controlnet-net0", dtype=dtype)
        pipeline: Any = StableDiffusionControlNetPipeline.from_pretrained(
            folder / "model", controlnet=net, dtype=dtype, safety_checker=None
        )
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", dtype=dtype, safety_checker=None)
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    control = {"image": [Image.open(io.BytesIO(_control(side_px)))] * batch} if with_net else {}

    def work() -> None:
        made = pipeline(
            prompt=[f"an apple number {seed}" for seed in range(batch)],
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(batch)],
            width=side_px,
            height=side_px,
            **control,
        )
        for image in made.images:
            image.save(io.BytesIO(), "PNG")

    work()
    best_s = min(_wall_s(work) for _ in range(rounds))
    pipeline.to("cpu")
    _free(device)
    return best_s


def _requests(count: int, side_px: int, steps: int, *, net: str) -> list[Request]:
    control = diffusion_pb2.Control(controlnet=net, image=common_pb2.Picture(data=_control(side_px))) if net else None
    return [
        Request(
            prompt=f"an apple number {seed}",
            seed=seed,
            steps=steps,
            scheduler="pndm",
            guidance_scale=7.5,
            controls=[control] if control else [],
            **_sides(side_px),
        )
        for seed in range(count)
    ]


def _sides(side_px: int) -> Any:
    return {"width_px": side_px, "height_px": side_px}


def _control(side_px: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _save(pixels: np.ndarray) -> None:
    Image.fromarray((pixels * 255).round().astype("uint8")).save(io.BytesIO(), "PNG")


def _free(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _cpu_s(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _wall_s(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
