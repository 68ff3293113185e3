"""A stage's process: its gRPC server for direct calls, and beside it the lease loop with all its parts.

The worker's composition root. Knows no stage.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from fanlight.channel import open_channel
from services.kernel.config import CommonSettings
from services.kernel.grpc_server import RpcServer, address_of, require_tokens
from services.kernel.logs import get_logger
from services.kernel.process import EXIT_DEVICE_LOST, leave
from services.worker.admission import Admission
from services.worker.blobs import BlobCalls
from services.worker.device import DeviceState
from services.worker.leases import QueueCalls, Renewer, WorkerLeases
from services.worker.loop import LeaseLoop, Poller, WorkerLimits, WorkerSettings
from services.worker.ports import Stage
from services.worker.prefetch import Prefetcher
from services.worker.previews import PreviewMaker
from services.worker.retry import Env, RetryPolicy
from services.worker.runner import InputImages, TaskRunner

log = get_logger()

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._-]")
NODE_IN_ID_MAX = 64
# How long a process with a lost device may take to end, beside what it gives to its callers.
LEAVE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageServer:
    """The part of a stage's server that differs between stages."""

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
    device: DeviceState | None = None,
    leave: Callable[[int], object] = leave,
) -> None:
    """Answer direct calls and lease tasks until `stop` is set or the device is lost, then drain both.

    Prints `ready grpc=HOST:PORT` once calls are answered. SettingsError if it must not or cannot listen there.
    DeviceLost at the end if the device is lost; `leave` ends the process where what hangs keeps this from ending.
    """
    device = device or DeviceState()
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
            leasing = group.create_task(_lease(stage, admission, settings, common, stop))
            losing = group.create_task(
                _end_when_lost(device, rpc, stop, leave, after_s=2 * common.drain_grace_s + LEAVE_S)
            )
            await stop.wait()
            log.info("draining", grace_s=common.drain_grace_s)
        finally:
            await rpc.stop()
        await leasing
        losing.cancel()
    if device.error is not None:
        raise device.error


async def _end_when_lost(
    device: DeviceState, rpc: RpcServer, stop: asyncio.Event, leave: Callable[[int], object], *, after_s: float
) -> None:
    """Take no more work once the device is lost, and let those who wait know. Leave if that takes too long."""
    error = await device.wait_lost()
    log.error("device_lost", part=error.part, error=error.message)
    await rpc.set_serving(False)
    stop.set()
    await asyncio.sleep(after_s)
    log.error("left_what_hangs", after_s=after_s)
    leave(EXIT_DEVICE_LOST)


async def _lease(
    stage: Stage[Any], admission: Admission, settings: WorkerSettings, common: CommonSettings, stop: asyncio.Event
) -> None:
    if settings.gateway is None:
        log.info("no_gateway", stage=stage.name)
        return
    await work(stage, admission, settings, common, stop)


async def work(
    stage: Stage[Any],
    admission: Admission,
    settings: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
    *,
    env: Env | None = None,
    limits: WorkerLimits | None = None,
) -> None:
    """Lease tasks and run them until `stop` is set; then let them finish, or return them to the queue."""
    async with _channel(settings, common) as channel:
        prefetcher = Prefetcher(stage)
        leasing, renewer = _wire(
            stage, admission, settings, limits or WorkerLimits(), channel, stop, env or Env(), prefetcher
        )
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(renewer.run())
            prefetching = group.create_task(prefetcher.run())
            await leasing.run(group)
            prefetching.cancel()
            await leasing.drain(grace_s=common.drain_grace_s)
            renewing.cancel()


def _channel(settings: WorkerSettings, common: CommonSettings) -> grpc.aio.Channel:
    assert settings.gateway is not None
    return open_channel(
        settings.gateway,
        token=common.token_of_workers(),
        ca_file=common.tls_ca_file,
    )


def _wire(
    stage: Stage[Any],
    admission: Admission,
    settings: WorkerSettings,
    limits: WorkerLimits,
    channel: grpc.aio.Channel,
    stop: asyncio.Event,
    env: Env,
    prefetcher: Prefetcher,
) -> tuple[LeaseLoop, Renewer]:
    worker_id = f"{_NOT_IN_IDS.sub('-', settings.node)[:NODE_IN_ID_MAX]}-{stage.name}-{env.new_id()}"
    log.info("worker_started", worker=worker_id, gateway=settings.gateway, slots=admission.slots)
    delay_max_s = limits.retry_delay_max_s
    queue = QueueCalls(channel)
    leases = WorkerLeases(progress_every_s=settings.progress_every_s)
    retry = RetryPolicy(env, delay_max_s=delay_max_s, limit_s=limits.hand_in_limit_s)
    blobs = BlobCalls(channel, retry, env, read_bytes_max=limits.input_bytes_max)
    images = InputImages(blobs, cache_bytes=limits.input_cache_bytes)
    runner = TaskRunner(stage, admission, leases, queue, blobs, images, retry)
    poller = Poller(
        stage, leases, queue, blobs.goodput, prefetcher, worker_id=worker_id, node=settings.node, slots=admission.slots
    )
    leasing = LeaseLoop(admission, leases, poller, runner, settings, limits, prefetcher, env, stop)
    return leasing, Renewer(
        queue,
        leases,
        prefetcher,
        env,
        worker_id=worker_id,
        retry_delay_max_s=delay_max_s,
        make_previews=PreviewMaker(leases, env).make,
    )
