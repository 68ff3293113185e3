"""A stage whose tasks end when, and how, the test says."""

import asyncio
from collections.abc import Callable

from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.worker.ports import MadePreview, Outcome, Report, StageOutput, StageProgress

PATIENCE_S = 20.0


class FakeStage:
    """Tasks end at once unless `holds`; then when `finish` names them."""

    name = "preprocess"
    request_type = preprocessor_pb2.AnnotateRequest

    def __init__(self, *, holds: bool = False) -> None:
        self.holds = holds
        self.outputs = [b"an output"]
        self.provenance = ""
        self.warnings: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.version = "1"
        self.annotators = ["canny"]
        self.running: dict[str, Report] = {}
        self.beside: dict[str, int] = {}
        self.most_at_a_time = 0
        self.images: dict[str, bytes] = {}
        self.cancelled: list[str] = []
        # The steps whose previews were made.
        self.previews_made: list[int] = []
        self._finished: set[str] = set()
        self._changed = asyncio.Condition()

    def capabilities(self) -> queue_pb2.Capabilities:
        capabilities = queue_pb2.Capabilities()
        for annotator in self.annotators:
            capabilities.annotators.add(id=annotator, version=self.version)
        return capabilities

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = "cpu"
        worker.disk_models.append("starter")

    async def run(
        self, request: preprocessor_pb2.AnnotateRequest, task: queue_pb2.LeasedTask, report: Report
    ) -> Outcome:
        self.images[task.name] = request.image.data
        self.running[task.name] = report
        self.most_at_a_time = max(self.most_at_a_time, len(self.running))
        for name in self.running:
            self.beside[name] = max(self.beside.get(name, 0), len(self.running) - 1)
        try:
            await self._change()
            if self.holds:
                async with self._changed:
                    await self._changed.wait_for(lambda: not self.holds or task.name in self._finished)
        except asyncio.CancelledError:
            self.cancelled.append(task.name)
            raise
        finally:
            del self.running[task.name]
            await self._change()
        if task.name in self.failures:
            raise self.failures[task.name]
        outputs = [
            StageOutput(data=data, width_px=8, height_px=6, provenance=self.provenance, warnings=self.warnings)
            for data in self.outputs
        ]
        return Outcome(outputs=outputs, spans=[("annotate", 0.25)])

    async def finish(self, *names: str) -> None:
        self._finished.update(names)
        await self._change()

    async def let_go(self) -> None:
        """From now on tasks end at once."""
        self.holds = False
        await self._change()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(holds)

    async def until_running(self, *names: str) -> None:
        await self.until(lambda: set(names) <= set(self.running))

    def report(self, name: str, step: int, *, preview: bytes = b"") -> None:
        async def make() -> MadePreview:
            self.previews_made.append(step)
            return MadePreview(data=preview)

        self.running[name](StageProgress(step=step, steps=10, preview=make if preview else None))

    async def _change(self) -> None:
        async with self._changed:
            self._changed.notify_all()
