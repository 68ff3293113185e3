"""A worker with a cheap stage, for the chaos run: the real process and lease loop, images of a few bytes.

`FANLIGHT_CHAOS_STAGE` names the stage. Every image it makes is another one, so that a second delivery would show.
"""

import asyncio
import os
import random
import sys

from google.protobuf.message import Message

from fanlight.diffusion.v1 import diffusion_pb2
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
PNG = b"\x89PNG\r\n\x1a\n"
IMAGE_BYTES = 2_000


class Cheap:
    def __init__(self, name: str) -> None:
        self.name = name
        self.request_type: type[Message] = (
            preprocessor_pb2.AnnotateRequest if name == "preprocess" else diffusion_pb2.GenerateRequest
        )

    def capabilities(self) -> queue_pb2.Capabilities:
        capabilities = queue_pb2.Capabilities()
        if self.name == "preprocess":
            capabilities.annotators.add(id="cheap", version="1", device="cpu", controlnets=["cheap"])
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
        return Outcome(outputs=[StageOutput(data=PNG + os.urandom(IMAGE_BYTES), width_px=64, height_px=64)])


def main() -> int:
    logs.configure(level="info", style="json", service="chaos-worker")
    common, settings = load(CommonSettings), load(WorkerSettings)
    stage, admission = Cheap(os.environ["FANLIGHT_CHAOS_STAGE"]), Admission(slots=SLOTS, waiting_limit=1)
    return run(lambda stop: work(stage, admission, settings, common, stop))


if __name__ == "__main__":
    sys.exit(main())
