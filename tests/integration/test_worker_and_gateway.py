"""The worker's loop and the gateway as processes of their own: kills, restarts, and every result once."""

import asyncio
import io
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from PIL import Image

from fanlight.channel import open_channel
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc

JOBS = 50
PATIENCE_S = 60.0
SUCCEEDED = gateway_pb2.Job.STATE_SUCCEEDED
ENDED = {SUCCEEDED, gateway_pb2.Job.STATE_FAILED, gateway_pb2.Job.STATE_CANCELLED}


@dataclass
class Process:
    """A child whose standard output is read line by line."""

    child: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)

    async def until(self, pattern: str) -> re.Match[str]:
        """The first line, past or to come, that matches."""
        for line in self.lines:
            if found := re.search(pattern, line):
                return found
        async with asyncio.timeout(PATIENCE_S):
            while line := await self._read():
                if found := re.search(pattern, line):
                    return found
        raise AssertionError(f"ended without {pattern!r}")

    async def _read(self) -> str:
        assert self.child.stdout is not None
        line = (await self.child.stdout.readline()).decode()
        self.lines.append(line)
        return line

    async def ran(self) -> Counter[str]:
        """How often it ran each task; to ask for once it has ended."""
        while await self._read():
            pass
        return Counter(found[1] for line in self.lines if (found := re.search(r"running (\S+)", line)))

    async def end(self, signal_number: int = signal.SIGKILL) -> None:
        if self.child.returncode is None:
            self.child.send_signal(signal_number)
        await asyncio.wait_for(self.child.wait(), PATIENCE_S)


class House:
    """Starts processes and ends them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Process] = []
        self.address = "127.0.0.1:0"

    async def gateway(self, *, ttl_s: float = 2) -> Process:
        process = await self._start(
            "services.gateway",
            FANLIGHT_GATEWAY_GRPC=self.address,
            FANLIGHT_GATEWAY_HTTP="127.0.0.1:0",
            FANLIGHT_GATEWAY_OTHER_ANNOTATORS="echo",
            FANLIGHT_GATEWAY_DATA_DIR=str(self._folder / "data"),
            FANLIGHT_GATEWAY_LEASE_TTL_S=str(ttl_s),
        )
        self.address = (await process.until(r"ready grpc=(\S+)"))[1]
        return process

    async def worker(self, node: str, **environment: str) -> Process:
        return await self._start(
            "tests.fakes.worker_process",
            FANLIGHT_WORKER_GATEWAY=self.address,
            FANLIGHT_WORKER_NODE=node,
            **environment,
        )

    async def _start(self, module: str, **environment: str) -> Process:
        with (self._folder / f"{module}-{len(self._started)}.log").open("wb") as log:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
            )
        self._started.append(Process(child))
        return self._started[-1]

    async def end(self) -> None:
        for process in self._started:
            await process.end()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.end()


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (number, number, number)).save(data, "PNG")
    return data.getvalue()


async def create(jobs: Any, number: int) -> str:
    """A job for the stage that the worker process has; waits for that to be announced."""
    request = gateway_pb2.CreateJobRequest(request_id=f"job {number}")
    request.annotation.annotator = "echo"
    request.annotation.image.data = picture(number)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return (await jobs.CreateJob(request, timeout=10)).name
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.1)


async def ended(address: str, name: str) -> gateway_pb2.Job:
    """The job once it has ended; watches again when the gateway goes away."""
    revision = 0
    async with asyncio.timeout(PATIENCE_S), open_channel(address) as channel:
        stub = gateway_pb2_grpc.JobServiceStub(channel)
        while True:
            request = gateway_pb2.WatchJobRequest(name=name, after_revision=revision)
            try:
                async for event in stub.WatchJob(request, timeout=PATIENCE_S):
                    if event.HasField("job") and event.job.state in ENDED:
                        return event.job
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
            await asyncio.sleep(0.1)


async def create_all(address: str) -> list[str]:
    async with open_channel(address) as channel:
        stub = gateway_pb2_grpc.JobServiceStub(channel)
        return [await create(stub, number) for number in range(JOBS)]


def assert_each_result_once(jobs: Sequence[gateway_pb2.Job]) -> None:
    assert [job.state for job in jobs] == [SUCCEEDED] * JOBS
    assert [len(job.images) for job in jobs] == [1] * JOBS
    assert len({job.images[0].blob.digest for job in jobs}) == JOBS


async def test_a_worker_killed_in_the_middle_loses_no_task_and_no_result_comes_twice(house: House) -> None:
    await house.gateway()
    doomed = await house.worker("doomed", FANLIGHT_TEST_HOLD="1")
    names = await create_all(house.address)
    held = (await doomed.until(r"running (\S+)"))[1]
    other = await house.worker("other")
    await other.until("running")
    await doomed.end(signal.SIGKILL)
    jobs = await asyncio.gather(*(ended(house.address, name) for name in names))
    assert_each_result_once(jobs)
    await other.end(signal.SIGTERM)
    ran = await other.ran()
    assert ran == {f"{name}/tasks/1": 1 for name in names}
    assert held in ran


async def test_tasks_that_end_while_the_gateway_is_dead_are_handed_in_when_it_is_back(house: House) -> None:
    gateway = await house.gateway(ttl_s=60)
    worker = await house.worker("only", FANLIGHT_TEST_HOLD="1")
    names = await create_all(house.address)
    await worker.until("running")
    await gateway.end(signal.SIGKILL)
    worker.child.send_signal(signal.SIGUSR1)
    await house.gateway(ttl_s=60)
    jobs = await asyncio.gather(*(ended(house.address, name) for name in names))
    assert_each_result_once(jobs)
    await worker.end(signal.SIGTERM)
    assert await worker.ran() == {f"{name}/tasks/1": 1 for name in names}


async def test_a_worker_told_to_leave_gives_back_what_it_cannot_finish(house: House) -> None:
    await house.gateway()
    leaving = await house.worker("leaving", FANLIGHT_TEST_HOLD="1", FANLIGHT_DRAIN_GRACE_S="0")
    names = await create_all(house.address)
    await leaving.until("running")
    await leaving.end(signal.SIGTERM)
    assert leaving.child.returncode == 0
    other = await house.worker("other")
    jobs = await asyncio.gather(*(ended(house.address, name) for name in names))
    assert_each_result_once(jobs)
    await other.end(signal.SIGTERM)
    assert set((await other.ran()).values()) == {1}
