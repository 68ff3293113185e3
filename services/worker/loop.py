"""The lease loop, wired: leasing, renewing and running over one channel to the gateway. Knows no stage."""

import asyncio
import re
from typing import Any

import grpc.aio

from fanlight.channel import open_channel
from services.kernel.config import CommonSettings
from services.kernel.logs import get_logger
from services.worker.admission import Admission
from services.worker.blob_calls import BlobCalls
from services.worker.config import WorkerSettings
from services.worker.input_pictures import InputPictures
from services.worker.leases import Leases
from services.worker.leasing import Leasing
from services.worker.patience import Patience
from services.worker.poller import Poller
from services.worker.ports import Stage
from services.worker.prefetcher import Prefetcher
from services.worker.queue_calls import QueueCalls
from services.worker.renewer import Renewer
from services.worker.surroundings import Surroundings
from services.worker.task_runner import TaskRunner

log = get_logger()

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._-]")
NODE_IN_ID_MAX = 64


async def work(
    stage: Stage[Any],
    admission: Admission,
    settings: WorkerSettings,
    common: CommonSettings,
    stop: asyncio.Event,
    *,
    surroundings: Surroundings | None = None,
) -> None:
    """Lease tasks and do them until `stop` is set; then finish or give back what is left."""
    async with _channel(settings, common) as channel:
        prefetcher = Prefetcher(stage)
        wired = _wire(stage, admission, settings, channel, stop, surroundings or Surroundings(), prefetcher)
        leasing, renewer = wired
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(renewer.run())
            fetching = group.create_task(prefetcher.run())
            await leasing.run(group)
            fetching.cancel()
            await leasing.drain(grace_s=common.drain_grace_s)
            renewing.cancel()


def _channel(settings: WorkerSettings, common: CommonSettings) -> grpc.aio.Channel:
    assert settings.gateway is not None
    return open_channel(
        settings.gateway,
        token=common.token_of_workers(),
        ca_file=common.tls_ca_file,
        max_message_bytes=common.max_message_bytes,
    )


def _wire(
    stage: Stage[Any],
    admission: Admission,
    settings: WorkerSettings,
    channel: grpc.aio.Channel,
    stop: asyncio.Event,
    surroundings: Surroundings,
    prefetcher: Prefetcher,
) -> tuple[Leasing, Renewer]:
    worker_id = f"{_NOT_IN_IDS.sub('-', settings.node)[:NODE_IN_ID_MAX]}-{stage.name}-{surroundings.new_id()}"
    log.info("worker_started", worker=worker_id, gateway=settings.gateway, slots=admission.slots)
    delay_max_s = settings.retry_delay_max_s
    queue = QueueCalls(channel)
    leases = Leases(progress_every_s=settings.progress_every_s)
    patience = Patience(surroundings, delay_max_s=delay_max_s, limit_s=settings.hand_in_limit_s)
    blobs = BlobCalls(channel, patience, surroundings, read_bytes_max=settings.input_bytes_max)
    pictures = InputPictures(blobs, cache_bytes=settings.input_cache_bytes)
    runner = TaskRunner(stage, admission, leases, queue, blobs, pictures, patience)
    poller = Poller(
        stage, leases, queue, blobs.goodput, prefetcher, worker_id=worker_id, node=settings.node, slots=admission.slots
    )
    leasing = Leasing(admission, leases, poller, runner, settings, prefetcher, surroundings, stop)
    return leasing, Renewer(queue, leases, prefetcher, surroundings, worker_id=worker_id, retry_delay_max_s=delay_max_s)
