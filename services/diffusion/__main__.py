"""The diffusion service's process: settings in, objects wired, served until SIGTERM."""

import asyncio
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fanlight.contract.limits import DRAWN_SEED_LIMIT
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from fanlight.errors import FanlightError
from services.diffusion.abilities import Abilities
from services.diffusion.config import DiffusionSettings
from services.diffusion.digests import WeightDigests
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.ports import Studio
from services.diffusion.engine.thread import DeviceThread
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.library import Library
from services.diffusion.models.scan import scan, starter_folder
from services.diffusion.painter import Painter
from services.diffusion.parse.parser import Parser
from services.diffusion.remote import Remote
from services.diffusion.service import NAME, DiffusionService
from services.diffusion.stage import DiffusionStage
from services.diffusion.supply import Supply
from services.kernel import logs
from services.kernel.config import CommonSettings, SettingsError, load, refuse_unknown
from services.kernel.gpus import check_device
from services.kernel.process import leave, run
from services.weights.catalog import shipped, with_folder
from services.weights.provision import Provision
from services.weights.settings import WeightsSettings
from services.worker.admission import Admission
from services.worker.config import WorkerSettings
from services.worker.serve import StageServer, serve_stage

log = logs.get_logger()

CODEC_THREADS = 3


async def serve(
    settings: DiffusionSettings,
    weights: WeightsSettings,
    worker: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
) -> None:
    thread, codecs = DeviceThread(), ThreadPoolExecutor(CODEC_THREADS, thread_name_prefix="codec")
    remote = open_remote(settings, weights)
    catalogue = open_catalogue(settings, remote)
    try:
        async with Provision(weights) as provision:
            supply = Supply(catalogue, provision, remote, readers=codecs)
            await serve_models(settings, worker, common, stop, Shared(catalogue, supply, thread, codecs))
    finally:
        thread.close()
        codecs.shutdown()


@dataclass(frozen=True, slots=True)
class Shared:
    """What the process has one of."""

    catalogue: Catalogue
    supply: Supply
    thread: DeviceThread
    codecs: ThreadPoolExecutor


async def serve_models(
    settings: DiffusionSettings, worker: WorkerSettings, common: CommonSettings, stop: asyncio.Event, shared: Shared
) -> None:
    catalogue, supply = shared.catalogue, shared.supply
    library = make_library(settings, catalogue)
    engine = make_engine(settings, library, shared.thread, catalogue)
    digests = WeightDigests()
    abilities = make_abilities(settings, library)
    parser = make_parser(settings, catalogue, abilities)
    painter = Painter(engine, parser, codecs=shared.codecs, digests=digests, clock=time.monotonic)
    admission = Admission(slots=settings.slots, waiting_limit=settings.waiting_limit)
    service = DiffusionService(painter, admission, catalogue, library, digests, supply)
    server = StageServer(
        service=NAME,
        add=lambda rpc: diffusion_pb2_grpc.add_DiffusionServiceServicer_to_server(service, rpc),
        listen=settings.grpc,
    )
    stage = DiffusionStage(painter, engine, catalogue, library, digests, supply, abilities)
    async with asyncio.TaskGroup() as group:
        beside = [group.create_task(engine.run())]
        if settings.preload and (catalogue.checkpoints or catalogue.default_id):
            beside.append(group.create_task(preload(engine, catalogue, supply)))
        await serve_stage(stage, admission, server, settings=worker, common=common, stop=stop)
        for task in beside:
            task.cancel()


def make_library(settings: DiffusionSettings, catalogue: Catalogue) -> Library:
    return Library(
        device=settings.device,
        ram_bytes=settings.ram_bytes,
        vram_bytes=settings.vram_bytes,
        tiny_vae_of=catalogue.tiny_vae_of,
    )


def make_engine(settings: DiffusionSettings, library: Library, thread: DeviceThread, catalogue: Catalogue) -> Engine:
    return Engine(
        lambda: open_studio(settings, library),
        thread=thread,
        rows_limit=settings.slots,
        hold_limit_s=settings.hold_limit_s,
        clock=time.monotonic,
        family_of=catalogue.family_of,
    )


def make_abilities(settings: DiffusionSettings, library: Library) -> Abilities:
    return Abilities(
        pixels_limit=settings.max_pixels,
        has_safety_checker=settings.safety_checker_folder is not None,
        precision_of_device=lambda: library.precision,
    )


def make_parser(settings: DiffusionSettings, catalogue: Catalogue, abilities: Abilities) -> Parser:
    return Parser(
        catalogue=catalogue,
        abilities=abilities,
        picture_limits=settings.picture_limits(),
        random_seed=lambda: random.SystemRandom().randrange(DRAWN_SEED_LIMIT),
        safety=settings.safety_checker,
    )


def open_remote(settings: DiffusionSettings, weights: WeightsSettings) -> Remote:
    """What may be fetched. SettingsError where the operator's catalog cannot be read."""
    catalog = shipped()
    try:
        catalog = with_folder(catalog, weights.catalog_dir) if weights.catalog_dir else catalog
    except FanlightError as error:
        raise SettingsError(f"FANLIGHT_WEIGHTS_CATALOG_DIR: {error.message}") from error
    return Remote(catalog=catalog, fetch=settings.fetch, allows_hosts=bool(weights.url_hosts))


def open_catalogue(settings: DiffusionSettings, remote: Remote) -> Catalogue:
    """SettingsError when the default model is neither among those found nor to be fetched."""
    catalogue = scan(settings.folders() or [starter_folder()], default_id=settings.default_model)
    try:
        if settings.default_model and not remote.reference(settings.default_model, "checkpoint"):
            catalogue.default()
    except FanlightError as error:
        raise SettingsError(f"FANLIGHT_DIFFUSION_DEFAULT_MODEL: {error.message}") from error
    log.info(
        "models_found",
        checkpoints=[entry.id for entry in catalogue.checkpoints],
        controlnets=[entry.id for entry in catalogue.controlnets],
    )
    return catalogue


def open_studio(settings: DiffusionSettings, library: Library) -> Studio:
    """Imports torch and diffusers, which takes seconds: on the device thread, after the port is open."""
    import services.diffusion.models.shelf  # noqa: F401 - what the library loads models with
    from services.diffusion.engine.safety import SafetyChecker
    from services.diffusion.engine.studio import TorchStudio

    return TorchStudio(library, threads=settings.threads, safety=SafetyChecker(settings.safety_checker_folder))


async def preload(engine: Engine, catalogue: Catalogue, supply: Supply) -> None:
    """Whoever asks for a checkpoint that cannot be had is told; here it only costs the head start."""
    try:
        async with asyncio.TaskGroup() as group:
            # What loads weights is imported while they come.
            group.create_task(engine.open())
            async with supply.provided(diffusion_pb2.GenerateRequest(), lambda progress: None):
                await engine.load(catalogue.default())
    except Exception:
        log.exception("preload_failed")


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
    # Does not wait for what the device thread is at, though the interpreter would.
    leave(main())
