"""The stage `diffusion` for the lease loop: one leased task is one image."""

from functools import partial

from fanlight.contract import generation as generation_contract
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import FanlightError
from fanlight.queue.v1 import queue_pb2
from services.diffusion.engine.engine import DiffusionEngine, MeasuredStepTime
from services.diffusion.engine.ports import StepProgress
from services.diffusion.generator import ImageGenerator
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.faults import part_of_device
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.tiers import Residency
from services.diffusion.parse.abilities import Abilities
from services.diffusion.provenance import WeightDigests, for_record
from services.diffusion.supply import Supply
from services.diffusion.wire import capable_models, left_out_to_proto
from services.weights.transfer.download import DownloadProgress as FetchProgress
from services.worker import ports
from services.worker.device import DeviceLost


class DiffusionStage:
    name = "diffusion"
    request_type = GenerateRequest

    def __init__(
        self,
        generator: ImageGenerator,
        engine: DiffusionEngine,
        catalog: ModelCatalog,
        models: ModelManager,
        digests: WeightDigests,
        supply: Supply,
        abilities: Abilities,
    ) -> None:
        self._digests = digests
        self._supply = supply
        self._generator = generator
        self._engine = engine
        self._catalog = catalog
        self._models = models
        self._abilities = abilities
        # Whether what is loaded ahead of requests is still on its way.
        self.is_loading = False
        # The capabilities, and the state that they were made from.
        self._capabilities: tuple[object, queue_pb2.Capabilities] = (None, queue_pb2.Capabilities())

    def capabilities(self) -> queue_pb2.Capabilities:
        state = (self._catalog.revision, self._models.precision)
        if self._capabilities[0] != state:
            self._capabilities = (state, self._make_capabilities())
        return self._capabilities[1]

    def condition(self) -> ports.StageCondition:
        if self._engine.is_lost:
            return ports.StageCondition.LOST
        return ports.StageCondition.LOADING if self.is_loading else ports.StageCondition.WARM

    def _make_capabilities(self) -> queue_pb2.Capabilities:
        limits = self._abilities.limits().items()
        return queue_pb2.Capabilities(
            models=capable_models(self._catalog, digest_of=self._digests.named, offers=self._supply.offers),
            offers=self._abilities.offers(),
            limits=[queue_pb2.Limit(name=name, maximum=maximum) for name, maximum in limits],
            left_out=left_out_to_proto(self._catalog),
            left_out_count=self._catalog.left_out_count,
        )

    def describe(self, worker: queue_pb2.Worker) -> None:
        levels = {entry.id: self._models.residency(entry) for entry in self._catalog.entries}
        worker.device = self._models.device_name
        worker.vram_bytes = self._models.vram_bytes
        worker.disk_bytes = self._supply.room_bytes
        worker.step_times.extend(_step_time(time) for time in self._engine.step_times if time.mean_s)
        here = [name for name, level in levels.items() if level is not Residency.REMOTE]
        worker.disk_models[:] = [*here, *(model.id for model in self._supply.remote_models() if model.is_on_disk)]
        worker.ram_models[:] = [name for name, level in levels.items() if level is Residency.RAM]
        worker.vram_models[:] = [name for name, level in levels.items() if level is Residency.VRAM]
        if link_bps := self._supply.link_bps:
            worker.goodput_bps = link_bps

    async def prefetch(self, model: str, kind: str) -> None:
        await self._supply.prefetch(model, kind)

    async def run(self, request: GenerateRequest, task: queue_pb2.LeasedTask, report: ports.Report) -> ports.Outcome:
        try:
            return await self._run(request, task, report)
        except FanlightError as error:
            if isinstance(error, DeviceLost):
                error.of_part(part_of_device(self._models.device_name))
            error.part = self._supply.part_as_named(request, error.part) if error.part else ""
            raise

    async def _run(self, request: GenerateRequest, task: queue_pb2.LeasedTask, report: ports.Report) -> ports.Outcome:
        self._generator.check(request)
        async with self._supply.provided(request, lambda fetching: report(_fetching(fetching))):
            generation = await self._generator.parse(request, alone=task.alone)
            result = await self._generator.generate(generation, lambda progress: report(self._to_report(progress)))
        output = ports.StageOutput(
            data=result.data,
            width_px=generation.result_size_px[0],
            height_px=generation.result_size_px[1],
            seed=generation.seed,
            nsfw=result.nsfw,
            provenance=for_record(result.provenance),
            # The gateway says itself what the contract says.
            warnings=[each for each in result.warnings if each not in set(generation_contract.warnings_of(request))],
        )
        return ports.Outcome(outputs=[output], spans=result.spans)

    def _to_report(self, progress: StepProgress) -> ports.StageProgress:
        preview = partial(self._generator.preview, progress.preview) if progress.preview else None
        return ports.StageProgress(step=progress.step, steps=progress.steps, preview=preview)


def _step_time(time: MeasuredStepTime) -> queue_pb2.StepTime:
    return queue_pb2.StepTime(
        family=time.family, size_class=time.size_class, mean_s=time.mean_s, deviation_s=time.deviation_s
    )


def _fetching(progress: FetchProgress) -> ports.StageProgress:
    return ports.StageProgress(fetch=progress.whole or progress)
