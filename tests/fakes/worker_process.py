"""A worker in a process of its own, to be killed: `python -m tests.fakes.worker_process`, settings as any worker's.

Its stage returns each image as its control image. With FANLIGHT_TEST_HOLD its tasks end only after SIGUSR1.
"""

import asyncio
import os
import signal
import sys

from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.kernel import logs
from services.kernel.config import CommonSettings, load
from services.kernel.image_headers import size_in
from services.kernel.process import run
from services.worker.admission import Admission
from services.worker.loop import WorkerSettings
from services.worker.ports import Outcome, Report, StageOutput
from services.worker.serve import work

SLOTS = 3


class Echo:
    name = "preprocess"
    request_type = preprocessor_pb2.AnnotateRequest

    def __init__(self, *, holds: bool) -> None:
        self._may_end = asyncio.Event()
        if not holds:
            self._may_end.set()

    def let_go(self) -> None:
        self._may_end.set()

    def capabilities(self) -> queue_pb2.Capabilities:
        capabilities = queue_pb2.Capabilities()
        capabilities.annotators.add(id="echo", version="1", device="cpu", deterministic=True)
        return capabilities

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = "cpu"

    async def run(
        self, request: preprocessor_pb2.AnnotateRequest, task: queue_pb2.LeasedTask, report: Report
    ) -> Outcome:
        sys.stdout.write(f"running {task.name}\n")
        sys.stdout.flush()
        await self._may_end.wait()
        size = size_in(request.image.data)
        assert size is not None
        output = StageOutput(data=request.image.data, width_px=size.width_px, height_px=size.height_px)
        return Outcome(outputs=[output])


def main() -> int:
    logs.configure(level="info", style="console", service="worker")
    common, settings = load(CommonSettings), load(WorkerSettings)
    stage = Echo(holds="FANLIGHT_TEST_HOLD" in os.environ)
    admission = Admission(slots=SLOTS, waiting_limit=1)

    async def main(stop: asyncio.Event) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stage.let_go)
        await work(stage, admission, settings, common, stop)

    return run(main)


if __name__ == "__main__":
    sys.exit(main())
