"""The stage `diffusion` for the lease loop: one leased task is one picture."""

from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.queue.v1 import queue_pb2
from services.diffusion.abilities import Abilities
from services.diffusion.digests import WeightDigests
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.ports import Progress
from services.diffusion.engine.step_times import StepTime
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.library import Library, Residency
from services.diffusion.painter import Painter
from services.diffusion.supply import Supply
from services.diffusion.wire import capable_models
from services.weights.targets import Progress as Fetching
from services.worker import ports


class DiffusionStage:
    name = "diffusion"
    request_type = GenerateRequest

    def __init__(
        self,
        painter: Painter,
        engine: Engine,
        catalogue: Catalogue,
        library: Library,
        digests: WeightDigests,
        supply: Supply,
        abilities: Abilities,
    ) -> None:
        self._digests = digests
        self._supply = supply
        self._painter = painter
        self._engine = engine
        self._catalogue = catalogue
        self._library = library
        self._abilities = abilities
        # What they were made of, and the capabilities.
        self._capabilities: tuple[object, queue_pb2.Capabilities] = (None, queue_pb2.Capabilities())

    def capabilities(self) -> queue_pb2.Capabilities:
        state = (self._catalogue.revision, self._library.precision)
        if self._capabilities[0] != state:
            self._capabilities = (state, self._able())
        return self._capabilities[1]

    def _able(self) -> queue_pb2.Capabilities:
        limits = self._abilities.limits().items()
        return queue_pb2.Capabilities(
            models=capable_models(self._catalogue, digest_of=self._digests.named, offers=self._supply.offers),
            offers=self._abilities.offers(),
            limits=[queue_pb2.Limit(name=name, maximum=maximum) for name, maximum in limits],
        )

    def describe(self, worker: queue_pb2.Worker) -> None:
        levels = {entry.id: self._library.residency(entry) for entry in self._catalogue.entries}
        worker.device = self._library.device_name
        worker.vram_bytes = self._library.vram_bytes
        worker.disk_bytes = self._supply.room_bytes
        worker.step_times.extend(_step_time(time) for time in self._engine.step_times if time.mean_s)
        here = [name for name, level in levels.items() if level is not Residency.REMOTE]
        worker.disk_models[:] = [*here, *(model.id for model in self._supply.remote_models() if model.is_held)]
        worker.ram_models[:] = [name for name, level in levels.items() if level is Residency.RAM]
        worker.vram_models[:] = [name for name, level in levels.items() if level is Residency.VRAM]
        if link_bps := self._supply.link_bps:
            worker.goodput_bps = link_bps

    async def fetch_ahead(self, model: str, kind: str) -> None:
        await self._supply.fetch_ahead(model, kind)

    async def run(self, request: GenerateRequest, task: queue_pb2.LeasedTask, report: ports.Report) -> ports.Outcome:
        self._painter.check(request)
        async with self._supply.provided(request, lambda fetching: report(_fetching(fetching))):
            generation = await self._painter.parse(request, alone=task.alone)
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


def _step_time(time: StepTime) -> queue_pb2.StepTime:
    return queue_pb2.StepTime(
        family=time.family, size_class=time.size_class, mean_s=time.mean_s, deviation_s=time.deviation_s
    )


def _fetching(progress: Fetching) -> ports.Progress:
    return ports.Progress(fetch=progress.whole or progress)


def _to_report(progress: Progress) -> ports.Progress:
    return ports.Progress(step=progress.step, steps=progress.steps, preview=progress.preview)
