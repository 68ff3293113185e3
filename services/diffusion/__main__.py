"""The diffusion service's process: settings in, objects wired, served until SIGTERM."""

import asyncio
import random
import sys
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fanlight.contract.limits import DRAWN_SEED_LIMIT
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from fanlight.errors import FanlightError
from fanlight.machine import this_machine
from services.diffusion.config import HOLD_LIMIT_S, WAITING_LIMIT, DiffusionSettings
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.diffusion.engine.ports import Backend
from services.diffusion.generator import ImageGenerator
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan, starter_folder
from services.diffusion.parse.abilities import Abilities
from services.diffusion.parse.parser import Parser
from services.diffusion.provenance import WeightDigests
from services.diffusion.service import NAME, DiffusionService
from services.diffusion.stage import DiffusionStage
from services.diffusion.supply import RemoteModels, Supply
from services.kernel import logs
from services.kernel.config import CommonSettings, SettingsError, load, refuse_unknown
from services.kernel.images import ImageLimits
from services.kernel.process import check_device, count_gpus, environment_defaults, leave, long_imports, run
from services.weights.provision import Provision
from services.weights.references.catalog import shipped, with_folder
from services.weights.settings import WeightsSettings
from services.worker.admission import Admission
from services.worker.device import DeviceLost, DeviceState
from services.worker.loop import WorkerSettings
from services.worker.serve import StageServer, serve_stage
from services.worker.start import Usage, say_warm

log = logs.get_logger()

CODEC_THREADS = 3
AUTO_DEVICE = "auto"


async def serve(
    settings: DiffusionSettings,
    weights: WeightsSettings,
    worker: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
) -> None:
    thread, codecs = DeviceThread(), ThreadPoolExecutor(CODEC_THREADS, thread_name_prefix="codec")
    # Of no lower priority: a thread that waits for its turn with the GIL would stop all others.
    previews = ThreadPoolExecutor(1, thread_name_prefix="preview")
    remote = open_remote(settings, weights)
    catalog = open_catalog(settings, remote)
    try:
        async with Provision(weights) as provision:
            supply = Supply(
                catalog,
                provision,
                remote,
                readers=codecs,
                checker=settings.safety_checker_folder,
                check_by_default=settings.safety_checker,
            )
            await serve_models(settings, worker, common, stop, Shared(catalog, supply, thread, codecs, previews))
    finally:
        thread.close()
        previews.shutdown(wait=False, cancel_futures=True)
        codecs.shutdown()


@dataclass(frozen=True, slots=True)
class Shared:
    """What the process has one of, opened before and closed after serving."""

    catalog: ModelCatalog
    supply: Supply
    thread: DeviceThread
    codecs: ThreadPoolExecutor
    previews: ThreadPoolExecutor


async def serve_models(
    settings: DiffusionSettings, worker: WorkerSettings, common: CommonSettings, stop: asyncio.Event, shared: Shared
) -> None:
    catalog, supply = shared.catalog, shared.supply
    models = make_models(settings, catalog)
    device = DeviceState()
    engine = make_engine(settings, models, shared, device)
    digests = WeightDigests()
    abilities = make_abilities(settings, models, supply)
    parser = make_parser(settings, catalog, abilities)
    generator = ImageGenerator(
        engine, parser, codecs=shared.codecs, previews=shared.previews, digests=digests, clock=time.monotonic
    )
    admission = Admission(slots=settings.slots, waiting_limit=WAITING_LIMIT)
    service = DiffusionService(
        generator, admission, catalog, models, digests, supply, preview_every_s=worker.progress_every_s
    )
    server = StageServer(
        service=NAME,
        add=lambda rpc: diffusion_pb2_grpc.add_DiffusionServiceServicer_to_server(service, rpc),
        listen=settings.grpc,
    )
    stage = DiffusionStage(generator, engine, catalog, models, digests, supply, abilities)

    async def warm_up() -> None:
        await preload(engine, catalog, supply, stage)
        if worker.measure:
            used = await measure(settings, models, generator, engine)
            say_warm(cores=used.cores, cards=used.cards)
        if worker.processes != "1":
            from services.worker.siblings import Siblings

            siblings = Siblings("diffusion", worker.processes, grace_s=common.drain_grace_s)
            found = await measure(settings, models, generator, engine) if siblings.needs_measurement else Usage()
            await siblings.run(stop, cores=found.cores, cards=found.cards)

    async with asyncio.TaskGroup() as group:
        beside = [group.create_task(until_lost(engine.run()))]
        if settings.preload and (catalog.checkpoints or catalog.default_id):
            beside.append(group.create_task(until_lost(warm_up())))
        await serve_stage(stage, admission, server, settings=worker, common=common, stop=stop, device=device)
        for task in beside:
            task.cancel()


async def until_lost(work: Coroutine[Any, Any, None]) -> None:
    """Do the work, also if it ends by a lost device: the server ends the process, once its callers know."""
    try:
        await work
    except* DeviceLost as lost:
        log.info("ended_by_lost_device", error=str(lost.exceptions[0]))


async def measure(
    settings: DiffusionSettings, models: ModelManager, generator: ImageGenerator, engine: DiffusionEngine
) -> Usage:
    """What this worker uses of the machine. A card that the settings name is the only one."""
    if not models.is_on_gpu:
        from services.diffusion.warmup import busy_cores

        return Usage(cores=await busy_cores(generator, engine))
    return Usage(cards=count_gpus() if settings.device == AUTO_DEVICE else 1)


def make_models(settings: DiffusionSettings, catalog: ModelCatalog) -> ModelManager:
    return ModelManager(
        device=settings.device,
        precision=settings.precision,
        ram_bytes=settings.ram_bytes,
        vram_bytes=settings.vram_bytes,
        tiny_vae_of=catalog.tiny_vae_of,
    )


def make_engine(
    settings: DiffusionSettings, models: ModelManager, shared: Shared, device: DeviceState
) -> DiffusionEngine:
    return DiffusionEngine(
        lambda: open_backend(settings, models, shared.supply),
        thread=shared.thread,
        rows_limit=settings.slots,
        hold_limit_s=HOLD_LIMIT_S,
        clock=time.monotonic,
        family_of=shared.catalog.family_of,
        device_name=lambda: models.device_name or settings.device,
        on_lost=device.lose,
    )


def make_abilities(settings: DiffusionSettings, models: ModelManager, supply: Supply) -> Abilities:
    return Abilities(
        pixels_limit=settings.max_pixels,
        has_safety_checker=supply.can_check,
        precision_of_device=lambda: models.precision,
    )


def make_parser(settings: DiffusionSettings, catalog: ModelCatalog, abilities: Abilities) -> Parser:
    return Parser(
        catalog=catalog,
        abilities=abilities,
        picture_limits=ImageLimits(),
        random_seed=lambda: random.SystemRandom().randrange(DRAWN_SEED_LIMIT),
        safety=settings.safety_checker,
    )


def open_remote(settings: DiffusionSettings, weights: WeightsSettings) -> RemoteModels:
    """What may be fetched. SettingsError where the operator's catalog cannot be read."""
    catalog = shipped()
    try:
        catalog = with_folder(catalog, weights.catalog_dir) if weights.catalog_dir else catalog
    except FanlightError as error:
        raise SettingsError(f"FANLIGHT_WEIGHTS_CATALOG_DIR: {error.message}") from error
    return RemoteModels(
        catalog=catalog,
        fetch=settings.fetch,
        allows_hosts=bool(weights.url_hosts),
        is_offline=weights.offline,
    )


def open_catalog(settings: DiffusionSettings, remote: RemoteModels) -> ModelCatalog:
    """SettingsError when the default model was not found and cannot be fetched."""
    catalog = scan(settings.folders() or [starter_folder()], default_id=settings.default_model)
    try:
        if settings.default_model and not remote.reference(settings.default_model, "checkpoint"):
            catalog.default()
    except FanlightError as error:
        raise SettingsError(f"FANLIGHT_DIFFUSION_DEFAULT_MODEL: {error.message}") from error
    log.info(
        "models_found",
        checkpoints=[entry.id for entry in catalog.checkpoints],
        controlnets=[entry.id for entry in catalog.controlnets],
    )
    return catalog


def open_backend(settings: DiffusionSettings, models: ModelManager, supply: Supply) -> Backend:
    """Imports torch and diffusers, which takes seconds: on the device thread, after the port is open."""
    # Torch would start a thread for each core of the host, whatever the container may use of them.
    with environment_defaults(OMP_NUM_THREADS=str(this_machine().threads)), long_imports():
        from services.diffusion.engine.backend import TorchBackend
        from services.diffusion.engine.safety import SafetyChecker

    return TorchBackend(models, threads=settings.threads, safety=SafetyChecker(supply.checker_folder))


async def preload(engine: DiffusionEngine, catalog: ModelCatalog, supply: Supply, stage: DiffusionStage) -> None:
    """Load the default checkpoint. A failure is only logged here: requests for it get the error. Raises DeviceLost."""
    stage.is_loading = True
    try:
        async with asyncio.TaskGroup() as group:
            # Import what loads weights while they are downloaded.
            group.create_task(engine.open())
            async with supply.provided(diffusion_pb2.GenerateRequest(), lambda progress: None):
                await engine.load(catalog.default())
    except Exception as error:
        if isinstance(error, ExceptionGroup) and (lost := error.subgroup(DeviceLost)):
            raise lost from error
        log.exception("preload_failed")
    finally:
        stage.is_loading = False


def main() -> int:
    try:
        refuse_unknown(CommonSettings, DiffusionSettings, WeightsSettings, WorkerSettings)
        common, worker, settings = load(CommonSettings), load(WorkerSettings), load(DiffusionSettings)
        weights = load(WeightsSettings)
        check_device(settings.device, setting="FANLIGHT_DIFFUSION_DEVICE")
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    logs.configure(level=common.log_level, style=common.log_format, service="diffusion")
    return run(lambda stop: serve(settings, weights, worker, common, stop), lifeline_fd=common.lifeline_fd)


if __name__ == "__main__":
    # The interpreter would wait for the device thread's work; this does not.
    leave(main())
