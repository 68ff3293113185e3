"""What somebody on the way between nodes, clients and the gateway sees: nothing of what they say over TLS."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fanlight.channel import Security, open_channel
from fanlight.client import AsyncClient, requests
from fanlight.contract.join_code import OWN_NAME, parse_join_code
from fanlight.gateway.v1.gateway_pb2 import Job
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from tests.fakes.gateway_process import RpcWorker
from tests.fakes.recording_proxy import RecordingProxy
from tests.fakes.secured_gateway import PIXEL, TOKEN, Secured

PROMPT = "a lighthouse that nobody may read of"


class Plain(Secured):
    """On loopback, where it has no TLS."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        self.grpc = self.http = "127.0.0.1:0"


@asynccontextmanager
async def recorded(gateway: Secured) -> AsyncIterator[RecordingProxy]:
    await gateway.start()
    try:
        async with RecordingProxy(gateway.address).running() as proxy:
            yield proxy
    finally:
        await gateway.stop()


async def walk(proxy: RecordingProxy, security: Security, ca_file: Path | None) -> Mapping[str, bytes]:
    """A node joins, leases, uploads and completes; a client invites, asks and downloads. What must stay secret."""
    async with AsyncClient(proxy.address, token=TOKEN, ca_file=ca_file) as client:
        code = parse_join_code((await client.nodes.invite()).join_code)
        async with open_channel(proxy.address, security=security) as stranger:
            asked = nodes_pb2.JoinRequest(join_code=str(code), name="the-attic")
            joined = await nodes_pb2_grpc.NodeServiceStub(stranger).Join(asked, timeout=30)
        async with open_channel(proxy.address, token=joined.credential, security=security) as channel:
            node = RpcWorker(channel, "diffusion", name=joined.node_id)
            await node.lease()
            job = await client.create_job(requests.generation(PROMPT, width_px=64, height_px=64))
            while not await node.work(wait_s=5.0):
                pass
            ended = await client.get_job(job.name)
            assert ended.state == Job.STATE_SUCCEEDED
            image = await client.read_blob(ended.images[0].blob)
            await client.write_blob(PIXEL)
    return {
        "prompt": PROMPT.encode(),
        "node": joined.node_id.encode(),
        "worker": f"{joined.node_id}-diffusion".encode(),
        "name": b"the-attic",
        "join code": code.secret.encode(),
        "new credential": joined.credential.encode(),
        "job": job.name.encode(),
        "image": image[-40:],
        "magic": b"\x89PNG",
        "photo": PIXEL,
    }


async def test_over_tls_nothing_is_in_clear(tmp_path: Path) -> None:
    gateway = Secured(tmp_path / "data")
    async with recorded(gateway) as proxy:
        roots = gateway.authority.read_bytes()
        secrets = await walk(proxy, Security(roots=roots, name=OWN_NAME), gateway.authority)
    assert proxy.connections >= 3
    assert proxy.size_bytes > 5_000
    assert [name for name, secret in secrets.items() if proxy.has(secret)] == []
    for each in (TOKEN.encode(), b"authorization", b"bearer", b"LeaseTasks", b"fanlight.queue"):
        assert not proxy.has(each)


async def test_the_same_walk_in_plain_text_shows_all_of_it(tmp_path: Path) -> None:
    """So that the test above would notice."""
    async with recorded(Plain(tmp_path / "data")) as proxy:
        secrets = await walk(proxy, Security(is_plain_text=True), None)
    assert [name for name, secret in secrets.items() if not proxy.has(secret)] == []


@pytest.mark.parametrize("hello", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64])
async def test_whoever_does_not_speak_tls_gets_an_alert_or_nothing(tmp_path: Path, hello: bytes) -> None:
    async with recorded(Secured(tmp_path / "data")) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
        writer.write(hello)
        async with asyncio.timeout(30):
            assert (await reader.read(1024))[:1] in (b"\x15", b"")
        writer.close()
