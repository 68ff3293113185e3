"""The stage `diffusion` for the lease loop: one leased task is one picture."""

from fanlight.queue.v1 import queue_pb2
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.ports import Progress
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.library import Library
from services.diffusion.painter import Painter
from services.diffusion.wire import models_to_proto
from services.kernel.errors import InvalidField
from services.worker import ports


class DiffusionStage:
    name = "diffusion"

    def __init__(self, painter: Painter, engine: Engine, catalogue: Catalogue, library: Library) -> None:
        self._painter = painter
        self._engine = engine
        self._catalogue = catalogue
        self._library = library

    def capabilities(self) -> queue_pb2.Capabilities:
        models = models_to_proto(self._catalogue, held=self._library.held, on_gpu=self._library.is_on_gpu)
        return queue_pb2.Capabilities(models=models)

    def describe(self, worker: queue_pb2.Worker) -> None:
        held = self._library.held
        entries = self._catalogue.entries
        in_memory = [entry.id for entry in entries if entry in held]
        worker.device = self._library.device_name
        worker.step_s = self._engine.step_s
        worker.disk_models[:] = [entry.id for entry in entries]
        worker.ram_models[:] = [] if self._library.is_on_gpu else in_memory
        worker.vram_models[:] = in_memory if self._library.is_on_gpu else []

    async def run(self, task: queue_pb2.LeasedTask, report: ports.Report) -> ports.Outcome:
        if task.WhichOneof("work") != "generate":
            raise InvalidField("must be set; this worker generates", field="generate")
        generation = await self._painter.parse(task.generate, alone=task.alone)
        painted = await self._painter.paint(generation, lambda progress: report(_to_report(progress)))
        output = ports.Output(
            data=painted.png, width_px=generation.width_px, height_px=generation.height_px, seed=generation.seed
        )
        return ports.Outcome(outputs=[output], spans=painted.spans)


def _to_report(progress: Progress) -> ports.Progress:
    return ports.Progress(step=progress.step, steps=progress.steps, preview=progress.preview)
