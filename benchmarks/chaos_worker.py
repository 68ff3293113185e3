"""A worker with a cheap stage, for the chaos run: the real process and lease loop, images of a few bytes.

`FANLIGHT_CHAOS_STAGE` names the stage. Every generated image is another one, so that a second delivery would show; a
control image follows from its photo. `FANLIGHT_CHAOS_LIAR` makes it lie: `garbage` for images, `nonsense` of requests
and progress, `claims` of everything, `vanishes` in the middle, `forges` control images that look right.
"""

import asyncio
import hashlib
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable, Mapping

from google.protobuf.message import Message

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.kernel import logs
from services.kernel.config import CommonSettings, load
from services.kernel.process import run
from services.worker.admission import Admission
from services.worker.loop import WorkerSettings
from services.worker.ports import Outcome, Report, StageOutput, StageProgress
from services.worker.serve import work

SLOTS = 3
STEPS = 4
STEP_S = (0.02, 0.4)
SIDE_PX = 64
# What a liar that claims everything takes for each task.
CLAIMS_S = 4.0


def png(seed: bytes) -> bytes:
    """A sound image of 64 x 64 pixels, the same one for the same seed."""
    header = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 0, 0, 0, 0)
    pixels = hashlib.shake_256(seed).digest(SIDE_PX * SIDE_PX)
    rows = b"".join(b"\x00" + pixels[start : start + SIDE_PX] for start in range(0, len(pixels), SIDE_PX))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


class Cheap:
    def __init__(self, name: str) -> None:
        self.name = name
        self.request_type: type[Message] = (
            preprocessor_pb2.AnnotateRequest if name == "preprocess" else diffusion_pb2.GenerateRequest
        )

    def capabilities(self) -> queue_pb2.Capabilities:
        capabilities = queue_pb2.Capabilities()
        if self.name == "preprocess":
            known = {"version": "1", "device": "cpu", "deterministic": True, "controlnets": ["cheap"]}
            capabilities.annotators.add(id="cheap", **known)
        else:
            capabilities.models.add(id="cheap", kind="checkpoint", is_default=True, width_px=64, height_px=64)
            capabilities.models.add(id="cheap", kind="controlnet")
        return capabilities

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = "cpu"
        worker.disk_models[:] = [] if self.name == "preprocess" else ["cheap"]

    async def run(self, request: Message, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        for step in range(STEPS):
            report(StageProgress(step=step, steps=STEPS))
            await asyncio.sleep(random.uniform(*STEP_S))
        return _outcome(png(self.seed(request)))

    def seed(self, request: Message) -> bytes:
        """What the result follows from."""
        return request.image.data if isinstance(request, preprocessor_pb2.AnnotateRequest) else os.urandom(16)


def _outcome(data: bytes) -> Outcome:
    return Outcome(outputs=[StageOutput(data=data, width_px=SIDE_PX, height_px=SIDE_PX)])


class Garbage(Cheap):
    """Hands in what is no image, or half of one."""

    async def run(self, request: Message, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        return _outcome(random.choice([os.urandom(2_000), b"<html></html>", png(b"")[:-20], b""]))


class Nonsense(Cheap):
    """Says that sound requests are wrong, and reports steps that cannot be."""

    async def run(self, request: Message, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        report(StageProgress(step=2**31, steps=1))
        await asyncio.sleep(0.1)
        raise InvalidField("is not what I like", field="prompt")


class Claims(Cheap):
    """Says that it holds all and is faster than light, and is slow."""

    def describe(self, worker: queue_pb2.Worker) -> None:
        super().describe(worker)
        worker.vram_models[:] = ["cheap", *(f"model-{number}" for number in range(1_000))]
        worker.goodput_bps = 1e15
        worker.step_times.add(size_class=12, mean_s=1e-12)

    async def run(self, request: Message, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        await asyncio.sleep(CLAIMS_S)
        return await super().run(request, task, report)


class Vanishes(Cheap):
    """Ends in the middle of every third task."""

    async def run(self, request: Message, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        if random.random() < 1 / 3:
            os._exit(1)
        return await super().run(request, task, report)


class Forges(Cheap):
    """Hands in another control image than the photo's; nothing in the image itself shows that."""

    def seed(self, request: Message) -> bytes:
        return os.urandom(16)


STAGES: Mapping[str, Callable[[str], Cheap]] = {
    "": Cheap,
    "garbage": Garbage,
    "nonsense": Nonsense,
    "claims": Claims,
    "vanishes": Vanishes,
    "forges": Forges,
}


def main() -> int:
    logs.configure(level="info", style="json", service="chaos-worker")
    common, settings = load(CommonSettings), load(WorkerSettings)
    stage = STAGES[os.environ.get("FANLIGHT_CHAOS_LIAR", "")](os.environ["FANLIGHT_CHAOS_STAGE"])
    admission = Admission(slots=SLOTS, waiting_limit=1)
    return run(lambda stop: work(stage, admission, settings, common, stop))


if __name__ == "__main__":
    sys.exit(main())
