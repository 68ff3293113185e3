"""The diffusion service beside diffusers: CPU time to be ready, mixed requests on the starter model, an answer's cost.

The service is a process of its own with its own defaults, asked over gRPC. diffusers is used as its documentation shows
it: one pipeline, made once, a scheduler for each request. Both sides take turns; prompts are new in every round.
Run: `python -m benchmarks.diffusion ready|mixed|answer [--rounds 5]`. With SD 1.5's shapes, see `diffusion_shapes`:
`python -m benchmarks.diffusion shapes|gpu|residency [--rounds 1] [--keep FOLDER]`; `gpu` says so where there is none.
"""

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.figures import Report, arguments, in_turns
from benchmarks.serving import cpu_s, served
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc

Request = diffusion_pb2.GenerateRequest

PIPELINE = "from diffusers import StableDiffusionControlNetPipeline"
SERVICE = ("-m", "services.diffusion")
GRPC = {"FANLIGHT_DIFFUSION_GRPC": "127.0.0.1:0"}
CALL_LIMIT_S = 1_800.0
# Scheduler, steps, and guidance where it is not the service's default.
MIXED: tuple[tuple[str, int, float | None], ...] = (
    ("ddim", 12, None),
    ("euler_a", 10, 3.0),
    ("DPM++ 2M Karras", 12, None),
    ("euler", 8, 7.0),
    ("ddim", 10, None),
    ("unipc", 12, None),
    ("euler_a", 12, None),
    ("DPM++ 2M Karras", 8, None),
)
DEFAULT_GUIDANCE = 5.0
# The names that requests use, and what diffusers' table of A1111's names gives for them.
PEER_SCHEDULERS: dict[str, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
ANSWERS_A_TURN = 10


def ready(rounds: int, report: Report) -> None:
    imported, opened, loaded = [], [], []
    for _ in range(rounds):
        before = os.times()
        subprocess.run([sys.executable, "-c", PIPELINE], check=True, stderr=subprocess.DEVNULL)
        after = os.times()
        imported.append(after.children_user + after.children_system - before.children_user - before.children_system)
        open_s, loaded_s = service_cpu_s()
        opened.append(open_s)
        loaded.append(loaded_s)
    theirs = f"`{PIPELINE}`"
    report.ratio("process started, port open", opened, imported, against=theirs, goal=0.8)
    report.ratio("process started, starter model loaded", loaded, imported, against=theirs, goal=0.8)
    report.add("CPU until the starter model is loaded", loaded, "s")


def service_cpu_s() -> tuple[float, float]:
    """CPU seconds from exec until the port answers, and until the starter model is in memory."""
    with served(*SERVICE, **GRPC, OMP_NUM_THREADS="1") as (pid, address), grpc.insecure_channel(address) as channel:
        service = diffusion_pb2_grpc.DiffusionServiceStub(channel)
        open_s = 0.0
        while True:
            models = service.ListModels(diffusion_pb2.ListModelsRequest(), wait_for_ready=True, timeout=120).models
            open_s = open_s or cpu_s(pid)
            if next(each.residency for each in models if each.is_default) >= diffusion_pb2.Model.RESIDENCY_RAM:
                return open_s, cpu_s(pid)
            time.sleep(0.05)


class Service:
    """The diffusion service; several requests at once, each to an encoded image."""

    def __init__(self, pid: int, channel: grpc.Channel) -> None:
        self._pid = pid
        self._stub = diffusion_pb2_grpc.DiffusionServiceStub(channel)

    def generate(self, requests: Sequence[Request]) -> tuple[float, float]:
        """CPU seconds of the service, and what the clients wait for the last image."""
        before_s, begin_s = cpu_s(self._pid), time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as clients:
            assert all(clients.map(self._image, requests))
        return cpu_s(self._pid) - before_s, time.perf_counter() - begin_s

    def _image(self, request: Request) -> bytes:
        answers = self._stub.Generate(request, timeout=CALL_LIMIT_S, wait_for_ready=True)
        return b"".join(answer.image.data for answer in answers if answer.WhichOneof("event") == "image")


class Peer:
    """diffusers' pipeline over a folder, made once; one request after another, each to a PNG as its images save it."""

    def __init__(self, folder: Path) -> None:
        import torch
        from diffusers import DiffusionPipeline

        self._pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, safety_checker=None, dtype=torch.float32
        )
        self._pipeline.set_progress_bar_config(disable=True)
        module = import_module("diffusers.schedulers")
        config = self._pipeline.scheduler.config
        self._schedulers = {
            name: lambda kind=kind, options=options: getattr(module, kind).from_config(config, **options)
            for name, (kind, options) in PEER_SCHEDULERS.items()
        }

    def generate(self, requests: Sequence[Request], threads: int) -> tuple[float, float]:
        """CPU seconds, and seconds."""
        import torch

        torch.set_num_threads(threads)
        before_s, begin_s = time.process_time(), time.perf_counter()
        for request in requests:
            self._pipeline.scheduler = self._schedulers[request.scheduler]()
            size = {"width": request.width_px, "height": request.height_px} if request.width_px else {}
            made = self._pipeline(
                prompt=request.prompt,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale if request.HasField("guidance_scale") else DEFAULT_GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                **size,
            )
            made.images[0].save(io.BytesIO(), "PNG")
        return time.process_time() - before_s, time.perf_counter() - begin_s


def mixed_requests(turn: int, kinds: Sequence[tuple[str, int, float | None]], *, side_px: int = 0) -> list[Request]:
    """Prompts and seeds of their own in every turn: no side has them in a cache."""
    return [
        Request(
            prompt=f"a red apple number {seed} of basket {turn}",
            seed=1_000 * turn + seed,
            scheduler=scheduler,
            steps=steps,
            guidance_scale=guidance,
            width_px=side_px,
            height_px=side_px,
        )
        for seed, (scheduler, steps, guidance) in enumerate(kinds)
    ]


def mixed(rounds: int, report: Report, *, smoke: bool) -> None:
    kinds = [(name, 1, guidance) for name, _, guidance in MIXED[:3]] if smoke else MIXED
    peer = Peer(starter() / "model")
    with served(*SERVICE, **GRPC) as (pid, address), grpc.insecure_channel(address) as channel:
        against_diffusers(report, Service(pid, channel), peer, kinds, rounds, goal=1.5, cores=int(smoke))


def against_diffusers(
    report: Report,
    service: Service,
    peer: Peer,
    kinds: Sequence[tuple[str, int, float | None]],
    rounds: int,
    *,
    goal: float,
    side_px: int = 0,
    cores: int = 0,
) -> None:
    """Images per CPU second, against diffusers on one thread; and per second, against its better number of threads."""
    cores = cores or os.cpu_count() or 1
    # CPU seconds and seconds of each turn.
    ours: list[tuple[float, float]] = []
    one: list[tuple[float, float]] = []
    several: list[tuple[float, float]] = []
    # The first turn imports and loads, and counts only where it is the only one.
    first = int(rounds > 1)
    for turn in range(rounds + first):
        requests = mixed_requests(turn, kinds, side_px=side_px)
        found = service.generate(requests), peer.generate(requests, 1), peer.generate(requests, cores)
        if turn >= first:
            for side, times in zip((ours, one, several), found, strict=True):
                side.append(times)
    what = f"{len(kinds)} mixed requests at once"
    report.ratio(
        f"{what}, images per CPU second",
        [cpu for cpu, _ in one],
        [cpu for cpu, _ in ours],
        against="one after another through diffusers' pipeline, 1 thread",
        goal=goal,
        at_least=True,
    )
    best = [min(wall, other) for (_, wall), (_, other) in zip(one, several, strict=True)]
    report.ratio(
        f"{what}, images per second",
        best,
        [wall for _, wall in ours],
        against=f"the same with 1 or {cores} threads, whichever is quicker",
        at_least=True,
    )
    report.add("CPU of an image", [cpu / len(kinds) for cpu, _ in ours], "s")


def starter() -> Path:
    """Where the model that ships with Fanlight lies."""
    return Path(str(resources.files("fanlight"))) / "starter"


def answer(rounds: int, report: Report) -> None:
    """One 512 x 512 image, from pixels on one side to the file's bytes on the other: CPU of both ends."""
    import cv2

    from services.diffusion.images import PARAMETERS, PROVENANCE, Format, encode

    pixels = photo_like(512)
    texts = {PARAMETERS: "a cat\nSteps: 20", PROVENANCE: "{}" * 500}

    class Answers(diffusion_pb2_grpc.DiffusionServiceServicer):
        def ListModels(self, request: Any, context: Any) -> Any:
            raise NotImplementedError

        def Generate(self, request: Any, context: Any) -> Any:
            data = encode(pixels, texts, format=Format.PNG, quality=90)
            yield diffusion_pb2.GenerateResponse(image=diffusion_pb2.GeneratedImage(data=data, media_type="image/png"))

    def in_base64() -> None:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        body = json.dumps({"images": [base64.b64encode(out.getvalue()).decode()]}).encode()
        base64.b64decode(json.loads(body)["images"][0])

    def raw() -> None:
        good, _ = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        assert good

    server = grpc.server(ThreadPoolExecutor(2))
    diffusion_pb2_grpc.add_DiffusionServiceServicer_to_server(Answers(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    cv2.setNumThreads(1)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        service = diffusion_pb2_grpc.DiffusionServiceStub(channel)

        def ours() -> None:
            assert len(list(service.Generate(Request(prompt="a cat")))) == 1

        ours()
        own, usual, competent = in_turns(rounds, *(_turn_of(work) for work in (ours, in_base64, raw)))
    server.stop(None)
    what = "a 512 x 512 PNG over gRPC, both ends"
    report.ratio(what, own, usual, against="Pillow's PNG in base64 in JSON, without its HTTP", goal=0.15)
    report.ratio(what, own, competent, against="OpenCV's PNG as raw bytes, without its HTTP")
    report.add("CPU of an answer", [each * 1e3 for each in own], "ms")


def _turn_of(work: Callable[[], None]) -> Callable[[], float]:
    """CPU seconds of one of so many."""

    def turn() -> float:
        begin_s = time.process_time()
        for _ in range(ANSWERS_A_TURN):
            work()
        return (time.process_time() - begin_s) / ANSWERS_A_TURN

    return turn


def photo_like(side_px: int) -> NDArray[np.uint8]:
    """Smooth colors with grain, (H, W, 3) RGB in 0 to 255."""
    y, x = np.mgrid[0:side_px, 0:side_px]
    smooth = np.stack([100 * np.sin(x / 37) + 20 * np.cos(y / 11), 90 * np.sin((x + y) / 51), 80 * np.cos(y / 29)], -1)
    grain = np.random.RandomState(0).normal(0, 4, smooth.shape)
    return np.clip(127 + smooth + grain, 0, 255).astype(np.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=["ready", "mixed", "answer", "shapes", "gpu", "residency"])
    parser.add_argument("--rounds", type=int, help="5; of shapes, gpu and residency 1")
    parser.add_argument("--keep", type=Path, help="of shapes, gpu, residency: a folder for the models, used again")
    parser.add_argument("--device", default="cuda", help="of gpu: another one shows that the command works")
    parser.add_argument("--small", action="store_true", help="of shapes and gpu: a smaller UNet, to try the command")
    asked = parser.parse_args(argv)
    report, is_quick = Report(), asked.what in ("ready", "mixed", "answer")
    rounds = 1 if asked.smoke else asked.rounds or (5 if is_quick else 1)
    if asked.what == "ready":
        ready(rounds, report)
    elif asked.what == "mixed":
        mixed(rounds, report, smoke=asked.smoke)
    elif asked.what == "answer":
        answer(rounds, report)
    else:
        from benchmarks import diffusion_shapes

        diffusion_shapes.measure(
            asked.what,
            rounds,
            asked.keep,
            report,
            device="cpu" if asked.smoke else asked.device,
            size="tiny" if asked.smoke else "small" if asked.small else "full",
        )
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
