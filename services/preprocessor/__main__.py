"""The preprocessor's process: settings in, objects wired, served until SIGTERM."""

import asyncio
import sys
import warnings

import cv2

from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from services.kernel import logs
from services.kernel.config import CommonSettings, SettingsError, load, refuse_unknown
from services.kernel.process import leave, run
from services.preprocessor import registry
from services.preprocessor.config import PreprocessorSettings
from services.preprocessor.engine import Engine
from services.preprocessor.service import PreprocessorService
from services.preprocessor.stage import PreprocessStage
from services.worker.admission import Admission
from services.worker.config import WorkerSettings
from services.worker.serve import StageServer, serve_stage

NAME = preprocessor_pb2.DESCRIPTOR.services_by_name["PreprocessorService"].full_name


async def serve(
    settings: PreprocessorSettings, worker: WorkerSettings, common: CommonSettings, stop: asyncio.Event
) -> None:
    annotators = registry.core()
    limits = settings.picture_limits()
    cv2.setNumThreads(settings.opencv_threads)
    engine = Engine(threads=settings.slots, limits=limits)
    admission = Admission(slots=settings.slots, waiting_limit=settings.waiting_limit)
    service = PreprocessorService(
        annotators, engine, admission, limits=limits, max_message_bytes=common.max_message_bytes
    )
    stage = PreprocessStage(annotators, engine, limits=limits)
    server = StageServer(
        service=NAME,
        add=lambda rpc: preprocessor_pb2_grpc.add_PreprocessorServiceServicer_to_server(service, rpc),
        listen=settings.grpc,
    )
    try:
        await serve_stage(stage, admission, server, settings=worker, common=common, stop=stop)
    finally:
        engine.close()


def main() -> int:
    try:
        refuse_unknown(CommonSettings, PreprocessorSettings, WorkerSettings)
        common, worker, settings = load(CommonSettings), load(WorkerSettings), load(PreprocessorSettings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    # What Pillow says about damaged pictures is the client's affair, and the client is told.
    warnings.filterwarnings("ignore", module="PIL")
    logs.configure(level=common.log_level, style=common.log_format, service="preprocessor")
    return run(lambda stop: serve(settings, worker, common, stop), lifeline_fd=common.lifeline_fd)


if __name__ == "__main__":
    leave(main())
