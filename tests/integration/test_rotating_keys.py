"""Keys rotate while work goes on: the issuer's, the gateway's certificate and authority, the nodes' credentials."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.chaos_issuer import Certificates, Issuer
from fanlight.client import AsyncClient, requests
from fanlight.gateway.v1.gateway_pb2 import Job
from fanlight.nodes.v1.nodes_pb2 import Node
from tests.fakes.secured_gateway import PIXEL, TOKEN, Secured, live_workers, until, worker

NODE = "machine-7"


class Platform:
    """An issuer, the gateway's certificates, and the settings of a worker on one machine."""

    def __init__(self, folder: Path) -> None:
        self.issuer, self.certificates = Issuer(folder / "issuer"), Certificates(folder / "tls")
        self._folder = folder

    async def open(self) -> None:
        await self.issuer.open()
        self.certificates.open()
        self.certificates.issue("gateway")
        self.issuer.write_token(NODE)

    def gateway(self) -> Secured:
        return Secured(
            self._folder / "data",
            FANLIGHT_GATEWAY_ISSUERS_FILE=str(self.issuer.rules_file),
            FANLIGHT_GATEWAY_CREDENTIAL_LIFETIME_S="20",
            **self.certificates.environment("gateway"),
        )

    def worker(self, gateway: Secured, state: str) -> dict[str, str]:
        return {
            "FANLIGHT_WORKER_GATEWAY": gateway.address,
            "FANLIGHT_TLS_CA_FILE": str(self.certificates.roots_file),
            "FANLIGHT_WORKER_IDENTITY_TOKEN_FILE": str(self.issuer.token_file(NODE)),
            "FANLIGHT_WORKER_STATE_DIR": str(self._folder / state),
            "FANLIGHT_WORKER_POLL_WAIT_S": "2",
        }

    def rotate(self) -> None:
        self.issuer.rotate()
        self.issuer.write_token(NODE)
        self.certificates.issue("gateway")


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    opened = Platform(tmp_path)
    await opened.open()
    yield opened
    await opened.issuer.close()


async def send(client: AsyncClient, stop: asyncio.Event) -> list[str]:
    """One job after the other, each of another photo; a client that insists."""
    names = []
    for number in itertools.count():
        if stop.is_set():
            return names
        photo = PIXEL[:-12] + number.to_bytes(4) + PIXEL[-12:]
        job = await client.create_job(requests.annotation("echo", photo), request_id=f"r{number}")
        names.append(job.name)
        await asyncio.sleep(0.2)
    raise AssertionError


async def node_of(client: AsyncClient) -> Node:
    (node,) = await client.nodes.list()
    return node


async def test_no_job_is_lost_while_all_keys_rotate(platform: Platform, tmp_path: Path) -> None:
    gateway, log = platform.gateway(), tmp_path / "worker.log"
    await gateway.start()
    roots, stop = platform.certificates.roots_file, asyncio.Event()
    async with AsyncClient(gateway.address, token=TOKEN, ca_file=roots, connect_s=60.0, timeout_s=60.0) as client:
        async with worker(log, platform.worker(gateway, "state-0")):
            await live_workers(client)
            sending = asyncio.create_task(send(client, stop))
            first = await node_of(client)
            # Its credential is renewed by itself, under load.
            await until(lambda: node_of(client), lambda node: node.renew_time.seconds > first.renew_time.seconds)
        for machine in (1, 2):
            # The machine starts again with an empty disk, and its platform and the gateway have new keys.
            platform.rotate()
            await gateway.stop()
            await gateway.start()
            async with worker(log, platform.worker(gateway, f"state-{machine}")):
                await live_workers(client)
                await asyncio.sleep(1.0)
                if machine == 2:
                    stop.set()
                    names = await sending
                    jobs = [await client.wait_job(each) for each in names]
        last = await node_of(client)
    await gateway.stop()
    assert len(names) > 10
    assert {job.state for job in jobs} == {Job.STATE_SUCCEEDED}
    assert (last.id, last.subject) == (first.id, NODE), "it is the same node under each key"
    assert platform.issuer.fetches == 3
    assert "copied" not in log.read_text()


@pytest.mark.long
async def test_a_node_waits_for_an_issuer_that_is_away(platform: Platform, tmp_path: Path) -> None:
    gateway, log = platform.gateway(), tmp_path / "worker.log"
    await gateway.start()
    platform.issuer.is_away = True
    roots = platform.certificates.roots_file
    async with (
        AsyncClient(gateway.address, token=TOKEN, ca_file=roots) as client,
        worker(log, platform.worker(gateway, "state")) as process,
    ):
        await until(lambda: asyncio.to_thread(text_of, log), lambda text: "poll_failed" in text)
        platform.issuer.is_away = False
        await live_workers(client)
        assert process.returncode is None
    await gateway.stop()
    assert "the keys of issuer platform cannot be read" in log.read_text()


def text_of(log: Path) -> str:
    return log.read_text() if log.exists() else ""
