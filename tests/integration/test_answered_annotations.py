"""What an annotation's answer says survives kill -9 of the gateway right after it: the job, and its image."""

import asyncio
import hashlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.synthetic_images import encoded, scene

LIMIT_S = 60


@pytest.fixture
async def gateway(tmp_path) -> AsyncIterator[GatewayProcess]:
    process = GatewayProcess(tmp_path / "data")
    await process.start()
    yield process
    await process.stop()


@pytest.fixture
async def preprocessor(gateway: GatewayProcess) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {"FANLIGHT_WORKER_GATEWAY": gateway.grpc, "FANLIGHT_PREPROCESSOR_GRPC": "127.0.0.1:0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.preprocessor", env={**os.environ, **environment}
    )
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def annotated(gateway: GatewayProcess, seed: int, *, wait: float) -> httpx.Response:
    """Once the preprocessor has joined."""
    async with asyncio.timeout(LIMIT_S), httpx.AsyncClient(base_url=f"http://{gateway.http}", timeout=LIMIT_S) as http:
        while True:
            image = encoded(scene(seed=seed))
            answer = await http.post("/v1/annotate/canny", content=image, params={"wait": wait})
            if answer.status_code in (200, 504):
                return answer
            await asyncio.sleep(0.1)


async def job_of(gateway: GatewayProcess, name: str, *, wait: float = 0.0) -> dict:
    async with httpx.AsyncClient(base_url=f"http://{gateway.http}", timeout=LIMIT_S) as http:
        return (await http.get(f"/v1/{name}", params={"wait": wait})).raise_for_status().json()


async def test_an_answered_annotation_is_there_after_a_kill(gateway: GatewayProcess, preprocessor) -> None:
    answers = [await annotated(gateway, seed, wait=LIMIT_S) for seed in range(3)]
    await gateway.stop(signal.SIGKILL)
    await gateway.start()

    for answer in answers:
        job = await job_of(gateway, answer.headers["Fanlight-Job"])
        assert job["state"] == "STATE_SUCCEEDED"
        digest = job["images"][0]["blob"]["digest"]
        async with httpx.AsyncClient(base_url=f"http://{gateway.http}", timeout=LIMIT_S) as http:
            kept = (await http.get(f"/v1/blobs/{digest}")).raise_for_status().content
        assert kept == answer.content
        assert digest == f"sha256:{hashlib.sha256(kept).hexdigest()}"


async def test_a_job_that_an_answer_names_before_its_end_goes_on_after_a_kill(gateway, preprocessor) -> None:
    await annotated(gateway, 1, wait=LIMIT_S)
    os.kill(preprocessor.pid, signal.SIGSTOP)
    answer = await annotated(gateway, 2, wait=0.2)
    assert answer.status_code == 504
    name = re.search(r"jobs/\w+", answer.text)[0]
    await gateway.stop(signal.SIGKILL)
    await gateway.start()
    os.kill(preprocessor.pid, signal.SIGCONT)

    assert (await job_of(gateway, name, wait=LIMIT_S / 2))["state"] == "STATE_SUCCEEDED"
