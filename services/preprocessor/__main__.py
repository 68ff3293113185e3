"""The preprocessor's process: reads the settings, wires the objects, serves until SIGTERM."""

import asyncio
import sys
import warnings

from services.kernel.process import environment_defaults

# numpy's BLAS would start one spinning thread per core, and no annotator multiplies large matrices.
with environment_defaults(OPENBLAS_NUM_THREADS="1"):
    import cv2

from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from services.kernel import logs
from services.kernel.config import CommonSettings, SettingsError, load, refuse_unknown
from services.kernel.process import leave, run
from services.preprocessor import registry
from services.preprocessor.cache import AnnotatorCacheLimits
from services.preprocessor.config import (
    CUDA,
    MODEL_THREADS,
    OPENCV_THREADS,
    WAITING_LIMIT,
    PreprocessorSettings,
    find_device,
)
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.service import PreprocessorService, PreprocessStage
from services.preprocessor.weights import FolderWeights, StoreWeights
from services.weights.settings import WeightsSettings
from services.worker.admission import Admission
from services.worker.device import DeviceState
from services.worker.loop import WorkerSettings
from services.worker.serve import StageServer, serve_stage
from services.worker.siblings import Siblings
from services.worker.start import say_warm

NAME = preprocessor_pb2.DESCRIPTOR.services_by_name["PreprocessorService"].full_name


async def serve(
    settings: PreprocessorSettings,
    weights: WeightsSettings,
    worker: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
) -> None:
    cv2.setNumThreads(OPENCV_THREADS)
    device = DeviceState()
    async with StoreWeights(weights) as store:
        engine = open_engine(settings, store, device)
        try:
            await serve_engine(engine, settings, worker, common, stop, device)
        finally:
            engine.close()


def open_engine(settings: PreprocessorSettings, store: StoreWeights, device: DeviceState) -> AnnotationEngine:
    return AnnotationEngine(
        threads=settings.slots,
        limits=settings.image_limits(),
        weights=FolderWeights(settings.models_dir, store),
        device=find_device(settings.device, threads=MODEL_THREADS),
        cache_limits=AnnotatorCacheLimits(size_bytes=settings.resident_bytes),
        on_lost=device.lose,
    )


async def serve_engine(
    engine: AnnotationEngine,
    settings: PreprocessorSettings,
    worker: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
    device: DeviceState,
) -> None:
    annotators = registry.installed()
    limits = settings.image_limits()
    admission = Admission(slots=settings.slots, waiting_limit=WAITING_LIMIT)
    service = PreprocessorService(
        annotators,
        engine,
        admission,
        limits=limits,
    )
    server = StageServer(
        service=NAME,
        add=lambda rpc: preprocessor_pb2_grpc.add_PreprocessorServiceServicer_to_server(service, rpc),
        listen=settings.grpc,
    )
    stage = PreprocessStage(annotators, engine, limits=limits)
    cards = int(engine.device.kind == CUDA)
    if worker.measure:
        say_warm(cores=1.0, cards=cards)
    async with asyncio.TaskGroup() as group:
        siblings = Siblings("preprocessor", worker.processes, grace_s=common.drain_grace_s)
        beside = group.create_task(siblings.run(stop, cards=cards))
        await serve_stage(stage, admission, server, settings=worker, common=common, stop=stop, device=device)
        beside.cancel()


def main() -> int:
    try:
        refuse_unknown(CommonSettings, PreprocessorSettings, WorkerSettings, WeightsSettings)
        common, worker = load(CommonSettings), load(WorkerSettings)
        settings, weights = load(PreprocessorSettings), load(WeightsSettings)
        settings.check()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    # Pillow warns about damaged images; the client gets an error about them instead.
    warnings.filterwarnings("ignore", module="PIL")
    logs.configure(level=common.log_level, style=common.log_format, service="preprocessor")
    return run(lambda stop: serve(settings, weights, worker, common, stop), lifeline_fd=common.lifeline_fd)


if __name__ == "__main__":
    leave(main())
