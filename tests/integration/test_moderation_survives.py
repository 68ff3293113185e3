"""A gateway process that is killed between a result and its verdict: asked again, and the job ends once."""

import asyncio
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from fanlight.client import AsyncClient
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.domain.job import PREPROCESS
from tests.fakes.fleet import photo
from tests.fakes.gateway_process import GatewayProcess, RpcWorker
from tests.fakes.moderation import http_answer, http_hook


@pytest.mark.parametrize(
    ("verdict", "state", "reason"),
    [
        (b'{"decision": "flag", "labels": ["seen"]}', gateway_pb2.Job.STATE_SUCCEEDED, ""),
        (b'{"decision": "block", "reason": "no"}', gateway_pb2.Job.STATE_FAILED, "CONTENT_BLOCKED"),
    ],
)
async def test_a_gateway_killed_before_the_verdict_asks_again(
    verdict: bytes, state: int, reason: str, tmp_path: Path
) -> None:
    asked, hangs = asyncio.Event(), True

    async def answer(headers: Mapping[str, str], body: bytes) -> bytes:
        if b"PHASE_REQUEST" in body:
            return http_answer(b'{"decision": "allow"}')
        asked.set()
        if hangs:
            await asyncio.sleep(60)
        return http_answer(verdict)

    async with http_hook(answer) as hook:
        gateway = GatewayProcess(
            tmp_path / "data",
            FANLIGHT_GATEWAY_MODERATION_URL=hook.url,
            FANLIGHT_GATEWAY_MODERATION_NETWORKS="127.0.0.0/8",
            FANLIGHT_GATEWAY_MODERATION_POLICY="flag",
            FANLIGHT_GATEWAY_MODERATION_IMAGES="bytes",
            FANLIGHT_GATEWAY_MODERATION_TIMEOUT_S="60",
        )
        await gateway.start()
        async with gateway.channel() as channel, AsyncClient(gateway.grpc) as client:
            worker = RpcWorker(channel, PREPROCESS)
            await worker.lease(0)
            request = preprocessor_pb2.AnnotateRequest(annotator="canny", image=photo())
            job = await client.create_job(request)
            [task] = await worker.lease()
            await worker.complete(task)
            async with asyncio.timeout(30):
                await asked.wait()
            waiting = await client.get_job(job.name)
            assert waiting.tasks[0].state == gateway_pb2.Task.STATE_JUDGING
            assert not waiting.images
        await gateway.stop(signal.SIGKILL)
        hangs = False
        await gateway.start()
        async with AsyncClient(gateway.grpc) as client:
            ended = await client.get_job(job.name)
            async with asyncio.timeout(30):
                async for event in client.watch_job(job.name):
                    ended = event.job if event.HasField("job") else ended
        await gateway.stop()
    assert (ended.state, ended.failure.reason) == (state, reason)
    assert [list(image.labels) for image in ended.images] == ([["seen"]] if not reason else [])
    results = [body for body in hook.bodies if body["phase"] == "PHASE_RESULT"]
    assert [each["id"] for each in results] == [f"{job.name.removeprefix('jobs/')}.1"] * 2
    assert all(each["images"][0]["data"] for each in results)
