"""The stage `diffusion` for the lease loop: one leased task is one picture."""

from fanlight.queue.v1 import queue_pb2
from services.diffusion.digests import WeightDigests
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.ports import Progress
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.library import Library, Residency
from services.diffusion.painter import Painter
from services.diffusion.supply import Supply
from services.diffusion.wire import models_to_proto
from services.kernel.errors import InvalidField
from services.weights.targets import Progress as Fetching
from services.worker import ports


class DiffusionStage:
    name = "diffusion"

    def __init__(
        self,
        painter: Painter,
        engine: Engine,
        catalogue: Catalogue,
        library: Library,
        digests: WeightDigests,
        supply: Supply,
    ) -> None:
        self._digests = digests
        self._supply = supply
        self._painter = painter
        self._engine = engine
        self._catalogue = catalogue
        self._library = library

    def capabilities(self) -> queue_pb2.Capabilities:
        models = models_to_proto(
            self._catalogue,
            residency_of=self._library.residency,
            digest_of=self._digests.known,
            remote=self._supply.remote_models(),
        )
        return queue_pb2.Capabilities(models=models)

    def describe(self, worker: queue_pb2.Worker) -> None:
        levels = {entry.id: self._library.residency(entry) for entry in self._catalogue.entries}
        worker.device = self._library.device_name
        worker.vram_bytes = self._library.vram_bytes
        worker.disk_bytes = self._supply.room_bytes
        worker.step_s = self._engine.step_s
        worker.step_s_deviation = self._engine.step_s_deviation
        here = [name for name, level in levels.items() if level is not Residency.REMOTE]
        worker.disk_models[:] = [*here, *(model.id for model in self._supply.remote_models() if model.is_held)]
        worker.ram_models[:] = [name for name, level in levels.items() if level is Residency.RAM]
        worker.vram_models[:] = [name for name, level in levels.items() if level is Residency.VRAM]
        if link_bps := self._supply.link_bps:
            worker.goodput_bps = link_bps

    async def fetch_ahead(self, model: str, kind: str) -> None:
        await self._supply.fetch_ahead(model, kind)

    async def run(self, task: queue_pb2.LeasedTask, report: ports.Report) -> ports.Outcome:
        if task.WhichOneof("work") != "generate":
            raise InvalidField("must be set; this worker generates", field="generate")
        async with self._supply.provided(task.generate, lambda fetching: report(_fetching(fetching))):
            generation = await self._painter.parse(task.generate, alone=task.alone)
            painted = await self._painter.paint(generation, lambda progress: report(_to_report(progress)))
        output = ports.Output(
            data=painted.data,
            width_px=generation.width_px,
            height_px=generation.height_px,
            seed=generation.seed,
            nsfw=painted.nsfw,
            provenance=painted.provenance,
        )
        return ports.Outcome(outputs=[output], spans=painted.spans)


def _fetching(progress: Fetching) -> ports.Progress:
    return ports.Progress(fetch=progress.whole or progress)


def _to_report(progress: Progress) -> ports.Progress:
    return ports.Progress(step=progress.step, steps=progress.steps, preview=progress.preview)
