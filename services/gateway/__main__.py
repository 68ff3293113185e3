"""The gateway's process: settings in, objects wired, gRPC and HTTP served until SIGTERM."""

import asyncio
import os
import sys
import time

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.adapters.disk_blobs import DiskBlobs
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.gateway import Gateway
from services.gateway.config import GatewaySettings
from services.gateway.http.factory import http_app
from services.gateway.http.options import HttpOptions
from services.gateway.http.server import bind_http, port_of, serve_http
from services.gateway.rpc.blobs import BlobService
from services.gateway.rpc.jobs import JobService
from services.gateway.rpc.queue import QueueService
from services.kernel import logs
from services.kernel.blobs import BlobStore
from services.kernel.config import CommonSettings, SettingsError, load, refuse_unknown
from services.kernel.listen import require_tokens
from services.kernel.process import leave, run
from services.kernel.rpc_server import RpcServer, address_of

JOB_SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["JobService"].full_name
QUEUE_SERVICE = queue_pb2.DESCRIPTOR.services_by_name["QueueService"].full_name
BLOB_SERVICE = blobs_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name

STORE_FILE = "gateway.sqlite"
BLOBS_FOLDER = "blobs"


class SystemClock:
    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()


async def serve(settings: GatewaySettings, common: CommonSettings, stop: asyncio.Event) -> None:
    _require_tokens(settings, common)
    _make_folder(settings)
    async with open_sqlite_store(settings.data_dir / STORE_FILE) as store:
        blobs = await asyncio.to_thread(
            DiskBlobs,
            settings.data_dir / BLOBS_FOLDER,
            budget_bytes=settings.blob_budget_bytes,
            blob_limit_bytes=settings.blob_limit_bytes,
        )
        try:
            gateway = Gateway(store=store, blobs=blobs, clock=SystemClock(), random_bytes=os.urandom, settings=settings)
            await gateway.load()
            async with asyncio.TaskGroup() as group:
                group.create_task(gateway.run())
                await gateway.wait_until_ready()
                await _listen(gateway, blobs, settings, common, stop, group)
        finally:
            blobs.close()


async def _listen(
    gateway: Gateway,
    blobs: BlobStore,
    settings: GatewaySettings,
    common: CommonSettings,
    stop: asyncio.Event,
    group: asyncio.TaskGroup,
) -> None:
    """Answer calls until `stop`, then let running ones end."""
    rpc = _rpc_server(gateway, blobs, common)
    app = http_app(
        gateway,
        blobs,
        HttpOptions(client_token=common.token_of_clients(), blob_limit_bytes=settings.blob_limit_bytes),
    )
    grpc_address = address_of(settings.grpc, rpc.bind(settings.grpc))
    sockets = bind_http(settings.http)
    try:
        await rpc.start()
        group.create_task(serve_http(app, sockets, stop, common))
        await rpc.set_serving(True)
        print(f"ready grpc={grpc_address} http={address_of(settings.http, port_of(sockets))}", flush=True)  # noqa: T201
        await stop.wait()
    finally:
        gateway.drain()
        await rpc.stop()


def _rpc_server(gateway: Gateway, blobs: BlobStore, common: CommonSettings) -> RpcServer:
    clients = tuple(filter(None, [common.token_of_clients()]))
    workers = tuple(filter(None, [common.token_of_workers()]))
    jobs, queue, blob = JobService(gateway), QueueService(gateway), BlobService(blobs)
    return RpcServer(
        common,
        services={
            JOB_SERVICE: lambda server: gateway_pb2_grpc.add_JobServiceServicer_to_server(jobs, server),
            QUEUE_SERVICE: lambda server: queue_pb2_grpc.add_QueueServiceServicer_to_server(queue, server),
            BLOB_SERVICE: lambda server: blobs_pb2_grpc.add_BlobServiceServicer_to_server(blob, server),
        },
        tokens={JOB_SERVICE: clients, QUEUE_SERVICE: workers},
        default_tokens=clients + workers,
    )


def _require_tokens(settings: GatewaySettings, common: CommonSettings) -> None:
    """SettingsError when somebody could call without the token that others need."""
    tokens = {"FANLIGHT_CLIENT_TOKEN": common.token_of_clients(), "FANLIGHT_WORKER_TOKEN": common.token_of_workers()}
    mutual_tls = common.tls_client_ca_file is not None
    if len([token for token in tokens.values() if token]) == 1:
        raise SettingsError("set both FANLIGHT_CLIENT_TOKEN and FANLIGHT_WORKER_TOKEN (or a _FILE of each), or none")
    for address in (settings.grpc, settings.http):
        require_tokens(address, tokens, mutual_tls=mutual_tls)


def _make_folder(settings: GatewaySettings) -> None:
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{settings.data_dir}: cannot be made: {error.strerror}") from error


def main() -> int:
    try:
        refuse_unknown(CommonSettings, GatewaySettings)
        common, settings = load(CommonSettings), load(GatewaySettings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    logs.configure(level=common.log_level, style=common.log_format, service="gateway")
    return run(lambda stop: serve(settings, common, stop), lifeline_fd=common.lifeline_fd)


if __name__ == "__main__":
    leave(main())
