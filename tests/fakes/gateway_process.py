"""The gateway as a process of its own, and the clients that talk to it."""

import asyncio
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import grpc.aio

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.contract.shipped import shipped_annotators
from fanlight.gateway.v1 import gateway_pb2_grpc
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.domain.workers import AnnouncedAnnotator
from services.gateway.wire import answers
from tests.fakes.fleet import OFFERS, result, size_in_request

START_LIMIT_S = 60
CALL_LIMIT_S = 30


class GatewayProcess:
    def __init__(self, data: Path, **environment: str) -> None:
        self.data = data
        self.environment = environment
        self.grpc = self.http = ""
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        settings = {
            "FANLIGHT_GATEWAY_DATA_DIR": str(self.data),
            "FANLIGHT_GATEWAY_GRPC": self.grpc or "127.0.0.1:0",
            "FANLIGHT_GATEWAY_HTTP": self.http or "127.0.0.1:0",
            "FANLIGHT_GATEWAY_OTHER_ANNOTATORS": "dream",
        }
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.gateway",
            stdout=asyncio.subprocess.PIPE,
            stderr=(self.data.parent / "gateway.log").open("a"),
            env={**os.environ, **settings, **self.environment},
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_LIMIT_S):
            line = (await self._process.stdout.readline()).decode()
        found = re.fullmatch(r"ready grpc=(\S+) http=(\S+)\n", line)
        assert found, (self.data.parent / "gateway.log").read_text()[-3000:]
        self.grpc, self.http = found[1], found[2]

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code. It starts again on the same ports."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(how)
        async with asyncio.timeout(CALL_LIMIT_S):
            return await self._process.wait()

    def channel(self, token: str = "") -> grpc.aio.Channel:
        return open_channel(self.grpc, token=token)


def as_shipped(made_up: AnnouncedAnnotator) -> AnnouncedAnnotator:
    """With the parameters that its namesake ships with: a gateway process takes no others."""
    shipped = shipped_annotators().get(made_up.id)
    return replace(made_up, parameters=shipped.parameters) if shipped else made_up


class RpcWorker:
    """A worker that leases tasks, and writes an image of its own for each."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        stage: str,
        name: str = "w",
        *,
        contract: queue_pb2.ContractRevision | None = None,
    ) -> None:
        self.queue = queue_pb2_grpc.QueueServiceStub(channel)
        self.blobs = blobs_pb2_grpc.BlobServiceStub(channel)
        self.stage, self.name, self.contract = stage, name, contract
        self.held: list[bytes] = []

    async def lease(self, limit: int = 8, wait_s: float = 0.0) -> list[queue_pb2.LeasedTask]:
        offers = OFFERS[self.stage]
        request = queue_pb2.LeaseTasksRequest(
            worker=queue_pb2.Worker(
                id=f"{self.name}-{self.stage}",
                node=self.name,
                stage=self.stage,
                slots=8,
                disk_models=sorted({each.id for each in offers.models}),
            ),
            capabilities_digest=self.stage.encode(),
            capabilities=queue_pb2.Capabilities(
                annotators=[answers.annotator(as_shipped(each)) for each in offers.annotators],
                models=[answers.model(each) for each in offers.models],
                contract=self.contract,
            ),
            max_tasks=limit,
            held_lease_tokens=self.held,
            wait_s=wait_s,
        )
        answer = await self.queue.LeaseTasks(request, timeout=wait_s + CALL_LIMIT_S, wait_for_ready=True)
        self.held += [task.lease_token for task in answer.tasks]
        return list(answer.tasks)

    async def complete(self, task: queue_pb2.LeasedTask) -> None:
        width_px, height_px = size_in_request(task.request)
        data = result(width_px, height_px, task.name.encode())
        parts = [
            blobs_pb2.WriteBlobRequest(header=blobs_pb2.WriteBlobHeader(scope=task.scope, size_bytes=len(data))),
            blobs_pb2.WriteBlobRequest(chunk=data),
        ]
        written = await self.blobs.WriteBlob(iter(parts), timeout=CALL_LIMIT_S, wait_for_ready=True)
        output = queue_pb2.Output(
            blob=common_pb2.Blob(scope=task.scope, digest=written.blob.digest), width_px=width_px, height_px=height_px
        )
        request = queue_pb2.CompleteTaskRequest(lease_token=task.lease_token, outputs=[output])
        await self.queue.CompleteTask(request, timeout=CALL_LIMIT_S, wait_for_ready=True)
        self.held.remove(task.lease_token)

    async def work(self, wait_s: float = 0.0) -> int:
        done = 0
        while tasks := await self.lease(wait_s=wait_s):
            for task in tasks:
                await self.complete(task)
                done += 1
        return done


def jobs_of(channel: grpc.aio.Channel) -> gateway_pb2_grpc.JobServiceStub:
    return gateway_pb2_grpc.JobServiceStub(channel)
