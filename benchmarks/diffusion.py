"""The diffusion service beside diffusers: CPU time to be ready, mixed requests on the starter model, an answer's cost.

CPU seconds are told, as machines are busy; both sides take turns and the least of the rounds counts.
Run: `python -m benchmarks.diffusion ready|mixed|answer [--rounds 3]`. With SD 1.5's shapes, see `diffusion_shapes`:
`python -m benchmarks.diffusion shapes|gpu|residency [--rounds 1] [--keep FOLDER]`; `gpu` says so where there is none.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc

PIPELINE = "from diffusers import StableDiffusionControlNetPipeline"
PORT = 50_953
REQUESTS = [
    {"scheduler": "ddim", "steps": 12},
    {"scheduler": "euler_a", "steps": 10, "guidance_scale": 3.0},
    {"scheduler": "DPM++ 2M Karras", "steps": 12},
    {"scheduler": "euler", "steps": 8, "guidance_scale": 7.0},
    {"scheduler": "ddim", "steps": 10},
    {"scheduler": "unipc", "steps": 12},
    {"scheduler": "euler_a", "steps": 12},
    {"scheduler": "DPM++ 2M Karras", "steps": 8},
]


def ready(rounds: int) -> None:
    ours, open_port, theirs = [], [], []
    for _ in range(rounds):
        before = os.times()
        subprocess.run([sys.executable, "-c", PIPELINE], check=True, stderr=subprocess.DEVNULL)
        after = os.times()
        theirs.append(after.children_user + after.children_system - before.children_user - before.children_system)
        opened, loaded = _service_cpu_s()
        open_port.append(opened)
        ours.append(loaded)
    print(f"import of diffusers' pipeline: {min(theirs):.2f} s CPU")
    print(f"service, port open: {min(open_port):.2f} s, ratio {min(open_port) / min(theirs):.2f}")
    print(f"service, default model loaded: {min(ours):.2f} s, ratio {min(ours) / min(theirs):.2f}")


def _service_cpu_s() -> tuple[float, float]:
    """CPU seconds from exec until the port answers, and until the starter model is in memory."""
    environment = {**os.environ, "FANLIGHT_DIFFUSION_GRPC": f"127.0.0.1:{PORT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "services.diffusion"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{PORT}") as channel:
            service = diffusion_pb2_grpc.DiffusionServiceStub(channel)
            opened, residency = 0.0, 0
            while residency < diffusion_pb2.Model.RESIDENCY_RAM:
                models = service.ListModels(diffusion_pb2.ListModelsRequest(), wait_for_ready=True, timeout=120).models
                opened = opened or _cpu_s(process.pid)
                residency = next(model.residency for model in models if model.is_default)
                time.sleep(0.05)
            return opened, _cpu_s(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _mixed_requests() -> list[diffusion_pb2.GenerateRequest]:
    return [
        diffusion_pb2.GenerateRequest(prompt=f"a red apple number {seed}", seed=seed, **fields)  # type: ignore[arg-type]
        for seed, fields in enumerate(REQUESTS)
    ]


def mixed(rounds: int) -> None:
    from services.diffusion.abilities import Abilities
    from services.diffusion.digests import WeightDigests
    from services.diffusion.engine.engine import Engine
    from services.diffusion.engine.studio import TorchStudio
    from services.diffusion.engine.thread import DeviceThread
    from services.diffusion.models.catalogue import Catalogue
    from services.diffusion.models.library import Library
    from services.diffusion.models.scan import scan, starter_folder
    from services.diffusion.painter import Painter
    from services.diffusion.parse.parser import Parser
    from services.kernel.pictures import PictureLimits
    from tests.fakes.diffusers_reference import Reference

    catalogue: Catalogue = scan([starter_folder()])
    abilities = Abilities(pixels_limit=2**20, has_safety_checker=False)
    parser = Parser(catalogue=catalogue, abilities=abilities, picture_limits=PictureLimits(), random_seed=lambda: 1)
    requests = _mixed_requests()
    reference = Reference(starter_folder())

    def theirs() -> None:
        for request in requests:
            generation = parser.parse(request)
            pixels = (reference.pixels(generation) * 255).round().astype("uint8")
            Image.fromarray(pixels).save(io.BytesIO(), "PNG")

    async def ours() -> float:
        thread, codecs = DeviceThread(), ThreadPoolExecutor(2)
        studio = TorchStudio(Library(device="cpu"), threads=1)
        engine = Engine(lambda: studio, thread=thread, rows_limit=8, hold_limit_s=20.0, clock=time.monotonic)
        running = asyncio.create_task(engine.run())
        painter = Painter(engine, parser, codecs=codecs, digests=WeightDigests(), clock=time.monotonic)

        async def all_at_once() -> None:
            parsed = [await painter.parse(request) for request in requests]
            await asyncio.gather(*(painter.paint(generation, lambda progress: None) for generation in parsed))

        await all_at_once()
        best = min([await _timed(all_at_once) for _ in range(rounds)])
        running.cancel()
        thread.close()
        codecs.shutdown()
        return best

    import torch

    torch.set_num_threads(1)
    theirs()
    loop_s = min(_cpu_of(theirs) for _ in range(rounds))
    ours_s = asyncio.run(ours())
    print(f"diffusers loop: {loop_s:.2f} s CPU for {len(requests)}; Fanlight: {ours_s:.2f} s; {loop_s / ours_s:.2f}x")


async def _timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    await work()
    return time.process_time() - began


def _cpu_of(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def answer(rounds: int) -> None:
    """One 512 x 512 picture, from pixels on one side to pixels' file on the other."""
    from services.diffusion.generation import Format
    from services.diffusion.pictures.encode import PARAMETERS, PROVENANCE, encode

    pixels = _photo_like(512)
    texts = {PARAMETERS: "a cat\nSteps: 20", PROVENANCE: "{}" * 500}

    class Answers(diffusion_pb2_grpc.DiffusionServiceServicer):
        def Generate(self, request: Any, context: Any) -> Any:
            data = encode(pixels, texts, format=Format.PNG, quality=90)
            yield diffusion_pb2.GenerateResponse(image=diffusion_pb2.Image(data=data, media_type="image/png"))

    server = grpc.server(ThreadPoolExecutor(2))
    diffusion_pb2_grpc.add_DiffusionServiceServicer_to_server(Answers(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        service = diffusion_pb2_grpc.DiffusionServiceStub(channel)

        def ours() -> None:
            for _ in range(10):
                list(service.Generate(diffusion_pb2.GenerateRequest()))

        def usual() -> None:
            for _ in range(10):
                out = io.BytesIO()
                Image.fromarray(pixels).save(out, "PNG")
                body = json.dumps({"images": [base64.b64encode(out.getvalue()).decode()]}).encode()
                base64.b64decode(json.loads(body)["images"][0])

        ours()
        our_s, usual_s = min(_cpu_of(ours) for _ in range(rounds)), min(_cpu_of(usual) for _ in range(rounds))
    server.stop(None)
    print(
        f"PNG over gRPC: {our_s * 100:.1f} ms CPU; Pillow, base64 and JSON, without HTTP: {usual_s * 100:.1f} ms;"
        f" ratio {our_s / usual_s:.3f}"
    )


def _photo_like(side: int) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side]
    smooth = np.stack([100 * np.sin(x / 37) + 20 * np.cos(y / 11), 90 * np.sin((x + y) / 51), 80 * np.cos(y / 29)], -1)
    grain = np.random.RandomState(0).normal(0, 4, smooth.shape)
    return np.clip(127 + smooth + grain, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["ready", "mixed", "answer", "shapes", "gpu", "residency"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="of shapes, gpu, residency: a folder for the models, used again")
    parser.add_argument("--device", default="cuda", help="of gpu: another one shows that the command works")
    parser.add_argument("--small", action="store_true", help="of shapes and gpu: a smaller UNet, to try the command")
    asked = parser.parse_args()
    if asked.what in ("ready", "mixed", "answer"):
        {"ready": ready, "mixed": mixed, "answer": answer}[asked.what](asked.rounds)
        return
    from benchmarks.diffusion_shapes import gpu, quiet, residency, shapes

    quiet()
    if asked.what == "shapes":
        shapes(asked.rounds, asked.keep, small=asked.small)
    elif asked.what == "gpu":
        gpu(asked.rounds, asked.keep, device=asked.device, small=asked.small)
    else:
        residency(asked.keep)


if __name__ == "__main__":
    main()
