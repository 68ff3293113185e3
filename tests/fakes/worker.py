"""A worker of the fake gateway, started and stopped around a test's body."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.kernel.config import CommonSettings
from services.worker.admission import Admission
from services.worker.loop import WorkerLimits, WorkerSettings
from services.worker.ports import Stage
from services.worker.retry import Env
from services.worker.serve import work
from tests.fakes.scripted_gateway import FakeGateway

PATIENCE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Working:
    admission: Admission
    stop: asyncio.Event
    task: "asyncio.Task[None]"

    async def leave(self) -> None:
        self.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await self.task


@asynccontextmanager
async def working(
    gateway: FakeGateway,
    stage: Stage[Any],
    *,
    slots: int = 1,
    drain_grace_s: float = 0.0,
    token: str = "",
    env: Env | None = None,
    limits: Mapping[str, Any] | None = None,
    common: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Working]:
    admission, stop = Admission(slots=slots, waiting_limit=4), asyncio.Event()
    quick = {"node": "node-1", "poll_wait_s": 5.0, "progress_every_s": 0.01}
    own = WorkerSettings(gateway=gateway.address, **(quick | settings))
    own_limits = WorkerLimits(**{"retry_delay_max_s": 0.02, **(limits or {})})
    shared = CommonSettings(drain_grace_s=drain_grace_s, worker_token=token or None, **(common or {}))
    task = asyncio.create_task(work(stage, admission, own, shared, stop, env=env, limits=own_limits))
    worker = Working(admission=admission, stop=stop, task=task)
    try:
        yield worker
        await worker.leave()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def task_of(request: Message, name: str = "jobs/a/tasks/1", *, alone: bool = False) -> queue_pb2.LeasedTask:
    task = queue_pb2.LeasedTask(name=name, attempt=1, alone=alone)
    task.request.Pack(request)
    return task


def task_named(name: str, *, alone: bool = False, blob: common_pb2.Blob | None = None) -> queue_pb2.LeasedTask:
    """To annotate the image that is the blob, for stages that look at it."""
    image = common_pb2.ImageSource(blob=blob) if blob else None
    return task_of(preprocessor_pb2.AnnotateRequest(annotator="canny", image=image), name, alone=alone)
