"""The lease loop. Knows the queue's protos and no stage."""

import asyncio

from services.kernel.config import CommonSettings
from services.worker.admission import Admission
from services.worker.config import WorkerSettings
from services.worker.ports import Stage


async def work(
    stage: Stage, admission: Admission, settings: WorkerSettings, common: CommonSettings, stop: asyncio.Event
) -> None:
    """Lease tasks and do them until `stop` is set; then finish or give back what is left."""
    await stop.wait()
