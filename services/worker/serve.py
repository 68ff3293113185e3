"""A stage's process: its gRPC server for health and direct calls, and beside it the lease loop with all its parts.

The worker's composition root. Knows no stage.
"""

import asyncio
import os
import re
import secrets
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from services.kernel.config import CommonSettings, SettingsError, drop_operator_secrets
from services.kernel.grpc_server import RpcServer, address_of, is_loopback
from services.kernel.logs import get_logger
from services.kernel.process import leave
from services.worker.admission import Admission
from services.worker.blobs import BlobCalls
from services.worker.device import DeviceLost, DeviceState
from services.worker.joining import GatewayContact
from services.worker.leases import QueueCalls, Renewer, WorkerLeases
from services.worker.loop import LeaseLoop, Poller, WorkerLimits, WorkerSettings
from services.worker.membership import Membership, credentials_of, membership_of, with_gateway
from services.worker.ports import Stage
from services.worker.prefetch import Prefetcher
from services.worker.previews import PreviewMaker
from services.worker.retry import Env, RetryPolicy
from services.worker.runner import InputImages, TaskRunner
from services.worker.start import until_listens
from services.worker.states import WorkerHealth

log = get_logger()

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._-]")
NODE_IN_ID_MAX = 64
# How long a process with a lost device may take to end, beside what it gives to its callers.
LEAVE_S = 10.0
WORKER_SECRET_BYTES = 32


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
    environ: MutableMapping[str, str] = os.environ,
    device: DeviceState | None = None,
    leave: Callable[[int], object] = leave,
) -> None:
    """Answer direct calls, if they are on, and lease tasks until `stop` is set or the device is lost, then drain both.

    Prints `ready grpc=HOST:PORT` once calls are answered. SettingsError if it cannot listen there or has nothing to do;
    JoinRefused if the gateway never takes it; DeviceLost at the end if the device is lost, unless what hangs with it
    keeps this from ending: then `leave` ends the process.
    """
    device = device or DeviceState()
    settings = with_gateway(settings)
    env, limits = Env(), WorkerLimits()
    rpc_settings, tokens = _direct_access(server, settings, common, drop_operator_secrets(environ))
    contact = _contact(settings, common, env, limits) if settings.gateway else None
    health = WorkerHealth(stage, admission, contact, unreachable_after_s=limits.unreachable_after_s, device=device)
    rpc = RpcServer(
        rpc_settings,
        services={} if tokens is None else {server.service: server.add},
        tokens={},
        default_tokens=tokens or (),
        get_health=health.state,
    )
    address = address_of(server.listen, rpc.bind(server.listen))
    await rpc.start()
    async with asyncio.TaskGroup() as group:
        left_s = common.drain_grace_s
        try:
            await rpc.set_serving(True)
            log.info("listening", address=address, service=server.service, direct_calls=tokens is not None)
            print(f"ready grpc={address}", flush=True)  # noqa: T201
            leasing = group.create_task(_lease(stage, admission, settings, common, stop, env, limits, contact))
            after_s = 2 * common.drain_grace_s + LEAVE_S
            losing = group.create_task(_end_when_lost(device, rpc, stop, leave, after_s=after_s))
            await stop.wait()
            log.info("draining", grace_s=common.drain_grace_s)
            end_s = env.now_s() + common.drain_grace_s
            # Health is answered until the leased tasks have ended.
            await rpc.drain()
            await leasing
            left_s = max(0.0, end_s - env.now_s())
        finally:
            await rpc.stop(grace_s=left_s)
        losing.cancel()
    if device.error is not None:
        raise device.error


async def _end_when_lost(
    device: DeviceState, rpc: RpcServer, stop: asyncio.Event, leave: Callable[[int], object], *, after_s: float
) -> None:
    """Take no more work once the device is lost, and let those who wait know. Leave if that takes too long."""
    error = await device.wait_lost()
    log.error("device_lost", part=error.part, error=error.message)
    await rpc.health.look()
    stop.set()
    await asyncio.sleep(after_s)
    log.error("left_what_hangs", after_s=after_s)
    leave(DeviceLost.exit_code)


def _direct_access(
    server: StageServer, settings: WorkerSettings, common: CommonSettings, operator_tokens: Sequence[str]
) -> tuple[CommonSettings, tuple[str, ...] | None]:
    """The settings of the server, and the tokens of which direct calls must have one; None: there are no direct calls.

    A certificate alone does not allow direct calls: the nodes of a fleet may have theirs from the same root. A server
    for health alone has no TLS, because the probes of platforms speak none. `operator_tokens`: names of settings.
    """
    token = settings.token_of_direct_calls()
    if operator_tokens:
        advice = "remove them from this machine; direct calls need FANLIGHT_WORKER_DIRECT_TOKEN"
        log.warning("operator_token_on_a_node", settings=operator_tokens, advice=advice)
    if token:
        if token == common.token_of_workers():
            raise SettingsError(
                "FANLIGHT_WORKER_DIRECT_TOKEN: must be another one than FANLIGHT_WORKER_TOKEN, which every node has"
            )
        return common, (token,)
    # Where the operator's token was there to protect direct calls, they are not opened to everyone instead.
    if is_loopback(server.listen) and not operator_tokens:
        return common, ()
    if settings.gateway is None:
        raise SettingsError(
            f"nothing to do: set FANLIGHT_WORKER_GATEWAY to lease tasks, or FANLIGHT_WORKER_DIRECT_TOKEN (or a _FILE)"
            f" to answer direct calls at {server.listen}"
        )
    bare = {"tls_cert_file": None, "tls_key_file": None, "tls_client_ca_file": None}
    return common.model_copy(update=bare), None


async def _lease(
    stage: Stage[Any],
    admission: Admission,
    settings: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
    env: Env,
    limits: WorkerLimits,
    contact: GatewayContact | None,
) -> None:
    if contact is None:
        log.info("no_gateway", stage=stage.name)
        return
    await work(stage, admission, settings, common, stop, env=env, limits=limits, contact=contact)


async def work(
    stage: Stage[Any],
    admission: Admission,
    settings: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
    *,
    env: Env | None = None,
    limits: WorkerLimits | None = None,
    contact: GatewayContact | None = None,
) -> None:
    """Lease tasks and run them until `stop` is set; then let them finish, or return them to the queue.

    JoinRefused if the gateway never takes this worker.
    """
    env, limits = env or Env(), limits or WorkerLimits()
    settings = with_gateway(settings)
    assert settings.gateway is not None
    await until_listens(settings.gateway, stop, wait_s=settings.gateway_wait_s, env=env)
    contact = contact or _contact(settings, common, env, limits)
    membership = membership_of(settings, common, contact, env)
    if not await membership.begin(stop, delay_max_s=limits.retry_delay_max_s):
        return
    async with membership.open_channel() as channel:
        prefetcher = Prefetcher(stage)
        leasing, renewer = _wire(
            stage, admission, settings, limits, channel, stop, env, prefetcher, contact, membership
        )
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(each) for each in (renewer.run(), membership.run())]
            prefetching = group.create_task(prefetcher.run())
            await leasing.run(group)
            prefetching.cancel()
            await leasing.drain(grace_s=common.drain_grace_s)
            for task in beside:
                task.cancel()


def _contact(settings: WorkerSettings, common: CommonSettings, env: Env, limits: WorkerLimits) -> GatewayContact:
    assert settings.gateway is not None
    return GatewayContact(
        settings.gateway,
        credentials_of(settings, common),
        env,
        refused_exit_s=limits.refused_exit_s,
        refused_again_exit_s=limits.refused_again_exit_s,
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
    contact: GatewayContact,
    membership: Membership,
) -> tuple[LeaseLoop, Renewer]:
    tail = f"{stage.name}-{env.new_id()}"
    named = _NOT_IN_IDS.sub("-", settings.node)[:NODE_IN_ID_MAX]

    def worker_id() -> str:
        return f"{membership.node_id or named}-{tail}"

    log.info("worker_started", worker=worker_id(), gateway=settings.gateway, slots=admission.slots)
    delay_max_s = limits.retry_delay_max_s
    queue = QueueCalls(channel)
    leases = WorkerLeases(progress_every_s=settings.progress_every_s)
    retry = RetryPolicy(env, delay_max_s=delay_max_s, limit_s=limits.hand_in_limit_s)
    blobs = BlobCalls(channel, retry, env, read_bytes_max=limits.input_bytes_max)
    images = InputImages(blobs, cache_bytes=limits.input_cache_bytes)
    runner = TaskRunner(stage, admission, leases, queue, blobs, images, retry)
    poller = Poller(
        stage,
        leases,
        queue,
        blobs.goodput,
        prefetcher,
        worker_id=worker_id,
        node=settings.node,
        slots=admission.slots,
        secret=secrets.token_bytes(WORKER_SECRET_BYTES),
        note_output_bytes_max=runner.note_output_bytes_max,
    )
    leasing = LeaseLoop(
        admission, leases, poller, runner, settings, limits, prefetcher, env, stop, contact, membership.recover
    )
    return leasing, Renewer(
        queue,
        leases,
        prefetcher,
        env,
        worker_id=worker_id,
        retry_delay_max_s=delay_max_s,
        make_previews=PreviewMaker(leases, env).make,
    )
