"""SD 1.5's own shapes with random weights: mixed requests on a CPU, and images per second and memory on a GPU.

Both sides read one folder, and diffusers' pipeline is used as its documentation shows it.
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
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import structlog
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

from benchmarks.diffusion import GRPC, SERVICE, Peer, Request, Service, against_diffusers
from benchmarks.figures import Report
from benchmarks.models import Size, filled, make_pipeline
from benchmarks.serving import served
from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.config import HOLD_LIMIT_S, DiffusionSettings
from services.diffusion.engine.backend import TorchBackend, assemble
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.diffusion.generator import ImageGenerator
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.device import shallow_copy_module
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan
from services.diffusion.parse.abilities import Abilities
from services.diffusion.parse.parser import Parser
from services.diffusion.provenance import WeightDigests
from services.kernel.images import ImageLimits
from tests.fakes.device import FakeGpu

MIXED: tuple[tuple[str, int, float | None], ...] = (
    ("ddim", 3, None),
    ("euler_a", 2, None),
    ("DPM++ 2M Karras", 3, None),
    ("euler", 2, None),
    ("ddim", 2, None),
    ("unipc", 3, None),
    ("euler_a", 3, None),
    ("DPM++ 2M Karras", 2, None),
)
MIXED_SIDE_PX, SMALL_SIDE_PX = 256, 64
# As the service itself has them where nothing is set.
ROWS_LIMIT = DiffusionSettings.model_fields["slots"].default
STEPS = 20
BATCHES = (1, 4, 8)
NETS = 14
# What a card of 12 GB has for models, as the service reckons.
CARD_BYTES = 12 << 30
CARD_MODELS_BYTES = int(CARD_BYTES * 0.85)


def make_sd15(root: Path, *, nets: int, size: Size) -> None:
    """`sd15/model` and so many ControlNets, all in fp16; the nets' files are one file by many names."""
    folder = root / "sd15"
    if (folder / "model" / "model_index.json").exists():
        return
    pipeline = make_pipeline(folder / "model", size=size, seed=0).to(dtype=torch.float16)
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    with torch.device("meta"):
        empty = ControlNetModel.from_unet(pipeline.unet, load_weights_from_unet=False)
    filled(empty).half().save_pretrained(folder / "controlnet-net0", safe_serialization=True)
    for number in range(1, nets):
        other = folder / f"controlnet-net{number}"
        other.mkdir()
        for file in (folder / "controlnet-net0").iterdir():
            os.link(file, other / file.name)


def parser_of(catalog: ModelCatalog) -> Parser:
    abilities = Abilities(pixels_limit=2**20, has_safety_checker=False)
    return Parser(catalog=catalog, abilities=abilities, picture_limits=ImageLimits(), random_seed=lambda: 1)


@contextlib.contextmanager
def generating(manager: ModelManager, parser: Parser, *, threads: int) -> Iterator[Callable[[Sequence[Request]], None]]:
    """Generates requests all at once, each to a PNG."""
    thread, codecs = DeviceThread(), ThreadPoolExecutor(2)
    backend = TorchBackend(manager, threads=threads)
    with asyncio.Runner() as runner:

        async def started() -> tuple[ImageGenerator, asyncio.Task[None]]:
            engine = DiffusionEngine(
                lambda: backend, thread=thread, rows_limit=ROWS_LIMIT, hold_limit_s=HOLD_LIMIT_S, clock=time.monotonic
            )
            generator = ImageGenerator(
                engine, parser, codecs=codecs, previews=codecs, digests=WeightDigests(), clock=time.monotonic
            )
            return generator, asyncio.create_task(engine.run())

        generator, running = runner.run(started())

        async def all_at_once(requests: Sequence[Request]) -> None:
            parsed = [await generator.parse(request) for request in requests]
            await asyncio.gather(*(generator.generate(generation, lambda progress: None) for generation in parsed))

        yield lambda requests: runner.run(all_at_once(requests))
        running.cancel()
    thread.close()
    codecs.shutdown()


def quiet() -> None:
    """No log of ours, no warning of theirs."""
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def measure(what: str, rounds: int, keep: Path | None, report: Report, *, device: str, size: Size) -> None:
    """`what`: shapes, gpu or residency."""
    quiet()
    if what == "shapes":
        shapes(rounds, keep, report, size=size)
    elif what == "gpu":
        gpu(rounds, keep, report, device=device, size=size)
    else:
        residency(keep, report, size=size)


def shapes(rounds: int, keep: Path | None, report: Report, *, size: Size) -> None:
    """MIXED at once, and one after another through diffusers, in float32."""
    kinds = [(name, 1, guidance) for name, _, guidance in MIXED[:2]] if size == "tiny" else MIXED
    with _folder(keep) as root:
        make_sd15(root, nets=1, size=size)
        settings = {**GRPC, "FANLIGHT_DIFFUSION_MODELS": str(root), "FANLIGHT_DIFFUSION_THREADS": "1"}
        with served(*SERVICE, **settings) as (pid, address), grpc.insecure_channel(address) as channel:
            side_px = SMALL_SIDE_PX if size != "full" else MIXED_SIDE_PX
            service, peer = Service(pid, channel), Peer(root / "sd15" / "model")
            against_diffusers(
                report, service, peer, kinds, rounds, goal=1.0, side_px=side_px, cores=int(size == "tiny")
            )


def gpu(rounds: int, keep: Path | None, report: Report, *, device: str, size: Size) -> None:
    """Images per second, 512 x 512, fp16, 20 steps; then the memory with 14 ControlNets in turns on a card of 12 GB."""
    is_cuda = device.startswith("cuda")
    if is_cuda and not torch.cuda.is_available():
        print("skipped: torch finds no CUDA device on this machine; nothing was measured")
        return
    side_px, steps = (512, STEPS) if size == "full" else (64, 2)
    with _folder(keep) as root:
        make_sd15(root, nets=1 if size == "tiny" else NETS, size=size)
        parser = parser_of(scan([root]))
        for net in (False, True):
            for batch in BATCHES[:1] if size == "tiny" else BATCHES:
                with generating(ModelManager(device=device), parser, threads=int(size == "tiny")) as ours:
                    ours(_requests(batch, side_px, steps, net="net0" if net else ""))
                    turns = [_requests(batch, side_px, steps, net="net0" if net else "", turn=n) for n in range(rounds)]
                    ours_s = [_wall_s(partial(ours, requests)) for requests in turns]
                _free(device)
                theirs_s = _theirs_s(root, rounds, batch, side_px, steps, device, with_net=net)
                report.ratio(
                    f"batch {batch}, {'one ControlNet' if net else 'no ControlNet'}, images per second",
                    theirs_s,
                    ours_s,
                    against="diffusers' pipeline with the same batch",
                    goal=1.8,
                    at_least=True,
                )
        if is_cuda:
            _report_memory(parser, device, side_px, steps, report)


def residency(keep: Path | None, report: Report, *, size: Size) -> None:
    """What residency holds on a card of 12 GB, counted without one: 14 ControlNets in turns, each copy a mere shape."""
    nets = 2 if size == "tiny" else NETS
    with _folder(keep) as root:
        make_sd15(root, nets=nets, size=size)
        card = _Card(memory_bytes=CARD_MODELS_BYTES)
        manager = ModelManager(open_device=lambda wanted: card)
        parser, most_bytes, uploads = parser_of(scan([root])), 0, []
        for turn in range(3):
            for number in range(nets):
                before = card.uploads
                assemble(manager, parser.parse(_requests(1, 512, 1, net=f"net{number}")[0]))
                cache: Any = manager._opened
                most_bytes = max(most_bytes, cache._vram.used_bytes)
                uploads += [card.uploads - before] if turn else []
    what = f"{nets} ControlNets in turns"
    report.add(f"{what}, most held in VRAM", most_bytes / 1e9, "GB", goal=CARD_MODELS_BYTES / 1e9)
    report.add(f"{what}, models brought from RAM for a change", sum(uploads) / len(uploads), "")


class _Card(FakeGpu):
    """Counts what lies on it."""

    dtype = torch.float16

    def upload(self, module: Any) -> Any:
        self.uploads += 1
        return shallow_copy_module(module, lambda name, tensor: tensor.to("meta"))


def _report_memory(parser: Parser, device: str, side_px: int, steps: int, report: Report) -> None:
    """As on a card of 12 GB: torch gets no more, and models fill the share of that which the service gives them."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / torch.cuda.mem_get_info()[1]))
    torch.cuda.reset_peak_memory_stats()
    manager = ModelManager(device=device, vram_bytes=CARD_MODELS_BYTES)
    with generating(manager, parser, threads=0) as ours:
        for number in [*range(NETS), *range(NETS)]:
            ours(_requests(1, side_px, steps, net=f"net{number}"))
    what = f"{NETS} ControlNets in turns, twice"
    report.add(f"{what}, most allocated", torch.cuda.max_memory_allocated() / 1e9, "GB", goal=CARD_BYTES / 1e9)
    report.add(f"{what}, most reserved", torch.cuda.max_memory_reserved() / 1e9, "GB", goal=CARD_BYTES / 1e9)


def _theirs_s(
    root: Path, rounds: int, batch: int, side_px: int, steps: int, device: str, *, with_net: bool
) -> list[float]:
    """Of the rounds, on one pipeline that was made before them."""
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

    def work(turn: int) -> None:
        made = pipeline(
            prompt=[f"apple {seed} of basket {turn}" for seed in range(batch)],
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(batch)],
            width=side_px,
            height=side_px,
            **control,
        )
        for image in made.images:
            image.save(io.BytesIO(), "PNG")

    work(rounds)
    taken_s = [_wall_s(partial(work, turn)) for turn in range(rounds)]
    pipeline.to("cpu")
    _free(device)
    return taken_s


def _requests(count: int, side_px: int, steps: int, *, net: str, turn: int = -1) -> list[Request]:
    """Prompts of their own in every turn."""
    control = (
        diffusion_pb2.Control(controlnet=net, image=common_pb2.ImageSource(data=_control(side_px))) if net else None
    )
    return [
        Request(
            prompt=f"apple {seed} of basket {turn}",
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


def _wall_s(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
