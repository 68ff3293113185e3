"""A worker whose device hangs in the middle of an image, as processes: its task fails by name, and its process ends."""

import asyncio
import os
import sys
from pathlib import Path

import grpc.aio
import pytest

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2
from services.worker.device import DeviceLost
from tests.fakes import hanging_worker
from tests.fakes.gateway_process import GatewayProcess, jobs_of

LIMIT_S = 90

pytestmark = pytest.mark.slow


async def test_a_hung_device_fails_its_task_by_name_and_the_process_ends_to_be_started_again(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "data")
    await gateway.start()
    root = Path(__file__).parents[2]
    settings = {"FANLIGHT_WORKER_GATEWAY": gateway.grpc, "FANLIGHT_DIFFUSION_GRPC": "127.0.0.1:0"}
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        hanging_worker.__file__,
        "5",
        env={**os.environ, "PYTHONPATH": str(root), **settings},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT_S), gateway.channel() as channel:
            jobs = jobs_of(channel)
            job = await _created(jobs)
            _, printed = await worker.communicate()
            found = await jobs.GetJob(gateway_pb2.GetJobRequest(name=job.name))
    finally:
        if worker.returncode is None:
            worker.kill()
        await gateway.stop()
    assert worker.returncode == DeviceLost.exit_code
    assert b"Traceback" not in printed
    assert b"the device has hung" in printed.splitlines()[-1]
    [attempt] = found.tasks[0].failed_attempts
    assert (attempt.failure.reason, attempt.failure.part) == ("DEVICE_LOST", "device:cpu")


async def _created(jobs) -> gateway_pb2.Job:
    """A job of more steps than the device does, as soon as the worker has come."""
    request = gateway_pb2.CreateJobRequest(
        generation=diffusion_pb2.GenerateRequest(prompt="a cat", steps=40, preview_every_steps=1), request_id="a"
    )
    while True:
        try:
            return await jobs.CreateJob(request)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.2)
