"""A stage's process: its gRPC server for direct calls, and the lease loop beside it. Knows no stage."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from services.kernel.config import CommonSettings
from services.kernel.grpc_server import RpcServer, address_of, require_tokens
from services.kernel.logs import get_logger
from services.worker.admission import Admission
from services.worker.config import WorkerSettings
from services.worker.loop import work
from services.worker.ports import Stage

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageServer:
    """What of a stage's server is not the same for every stage."""

    # The full name of its service, such as `fanlight.preprocessor.v1.PreprocessorService`.
    service: str
    # Adds the servicer.
    add: Callable[[grpc.aio.Server], None]
    # HOST:PORT.
    listen: str


async def serve_stage(
    stage: Stage[Any],
    admission: Admission,
    server: StageServer,
    *,
    settings: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
) -> None:
    """Answer direct calls and lease tasks until `stop` is set, then drain both.

    Prints `ready grpc=HOST:PORT` once calls are answered. SettingsError where it must not or cannot listen.
    """
    token = common.token_of_clients()
    mutual_tls = common.tls_client_ca_file is not None
    require_tokens(server.listen, {"FANLIGHT_CLIENT_TOKEN": token}, mutual_tls=mutual_tls)
    rpc = RpcServer(common, services={server.service: server.add}, tokens={}, default_tokens=(token,) if token else ())
    address = address_of(server.listen, rpc.bind(server.listen))
    await rpc.start()
    async with asyncio.TaskGroup() as group:
        try:
            await rpc.set_serving(True)
            log.info("listening", address=address, service=server.service)
            print(f"ready grpc={address}", flush=True)  # noqa: T201
            group.create_task(_lease(stage, admission, settings, common, stop))
            await stop.wait()
            log.info("draining", grace_s=common.drain_grace_s)
        finally:
            await rpc.stop()


async def _lease(
    stage: Stage[Any], admission: Admission, settings: WorkerSettings, common: CommonSettings, stop: asyncio.Event
) -> None:
    if settings.gateway is None:
        log.info("no_gateway", stage=stage.name)
        return
    await work(stage, admission, settings, common, stop)
