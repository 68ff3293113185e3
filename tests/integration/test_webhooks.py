"""Webhooks as their targets see them: signed, retried, not sent to internal addresses, and bounded in time."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

import pytest

from fanlight.errors import FailedPrecondition, InvalidField, Unavailable
from services.gateway.adapters.webhook_http import WebhookHttp
from services.gateway.app.webhooks import WebhookOptions, is_allowed
from services.gateway.domain.delivery import BACKOFF_S, DeliveryState
from services.gateway.domain.job import DIFFUSION
from services.gateway.wire.answers import payload
from tests.fakes.fleet import Fleet, generation

KEY = b"k" * 32
LOOPBACK = (ip_network("127.0.0.0/8"),)


@dataclass
class Target:
    port: int = 0
    statuses: list[int] = field(default_factory=lambda: [204])
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?a=1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
        self.heard.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\nLocation: http://10.0.0.1/\r\n\r\n".encode())
        await writer.drain()
        writer.close()


class Refusing:
    """As one whose target's name has been resolved."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        raise FailedPrecondition("points to an internal address, which this gateway does not allow")


@asynccontextmanager
async def listening(serve: Callable) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    target = Target()
    async with listening(target.serve) as target.port:
        yield target


def telling(fleet: Fleet) -> Fleet:
    options = WebhookOptions(sender=WebhookHttp(LOOPBACK), payload=payload, default_key=KEY, allowed=LOOPBACK)
    fleet.gateway.use_webhooks(options)
    return fleet


async def tick(fleet: Fleet) -> None:
    """Make the tries that are due, to their end."""
    async with asyncio.TaskGroup() as group:
        await asyncio.sleep(0)
        await fleet.gateway._core.webhooks.run(group)


async def an_ended_job(fleet: Fleet, url: str):
    job = await fleet.gateway.jobs.create(replace(generation(), webhook_url=url))
    await fleet.worker(DIFFUSION).work()
    return job


async def test_the_end_of_a_job_is_told_once_and_signed(target: Target) -> None:
    async with telling(Fleet()).running() as fleet:
        job = await an_ended_job(fleet, target.url)
        for _ in range(3):
            await tick(fleet)
        ((headers, body),) = target.heard
        told = json.loads(body)
        assert (told["type"], told["data"]["name"]) == ("job.succeeded", job.name)
        content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        signature = base64.b64encode(hmac.new(KEY, content, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"].lower() == f"v1,{signature}".lower()
        assert (await fleet.gateway.jobs.webhook(job.name)).state is DeliveryState.DELIVERED


async def test_a_target_that_fails_is_tried_again_later_under_the_same_id(target: Target) -> None:
    target.statuses = [500, 302, 200]
    async with telling(Fleet()).running() as fleet:
        job = await an_ended_job(fleet, target.url)
        for pause_s in (0.0, *BACKOFF_S[:2]):
            fleet.clock.advance(pause_s * 1.2)
            await tick(fleet)
            await tick(fleet)
        delivery = await fleet.gateway.jobs.webhook(job.name)
        assert [each.status for each in delivery.tries] == [500, 302, 200]
        assert delivery.state is DeliveryState.DELIVERED
        assert len({headers["webhook-id"] for headers, _ in target.heard}) == 1


async def test_a_target_that_says_it_is_gone_is_given_up(target: Target) -> None:
    target.statuses = [410]
    async with telling(Fleet()).running() as fleet:
        job = await an_ended_job(fleet, target.url)
        await tick(fleet)
        assert (await fleet.gateway.jobs.webhook(job.name)).state is DeliveryState.GIVEN_UP


async def test_a_target_that_turns_out_to_be_internal_is_given_up(target: Target) -> None:
    async with telling(Fleet()).running() as fleet:
        job = await an_ended_job(fleet, "https://hooks.example/")
        fleet.gateway.use_webhooks(WebhookOptions(sender=Refusing(), payload=payload, default_key=KEY))
        await tick(fleet)
        delivery = await fleet.gateway.jobs.webhook(job.name)
        assert (delivery.state, len(delivery.tries)) == (DeliveryState.GIVEN_UP, 1)
        assert "internal" in delivery.tries[0].error


async def test_a_delivery_survives_its_gateway(target: Target) -> None:
    fleet = telling(Fleet())
    async with fleet.running():
        await an_ended_job(fleet, target.url)
    assert target.heard == []
    async with telling(fleet.restarted()).running() as again:
        await tick(again)
        await tick(again)
    assert len(target.heard) == 1


async def test_of_two_gateways_one_tells(target: Target) -> None:
    async with telling(Fleet(is_shared=True)).running() as here, telling(here.restarted()).running() as there:
        await an_ended_job(here, target.url)
        for _ in range(20):
            await asyncio.sleep(0)
        await asyncio.gather(tick(here), tick(there))
        await asyncio.gather(tick(here), tick(there))
        assert len(target.heard) == 1


async def test_a_target_that_hangs_costs_a_bounded_time() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with listening(hang) as port:
        with pytest.raises(Unavailable, match=r"no answer within 0\.2 s"):
            await WebhookHttp(LOOPBACK, timeout_s=0.2).post(f"http://127.0.0.1:{port}/", {}, b"{}")


async def test_a_target_that_is_no_http_server_or_nobody_is_no_crash() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00" * 100_000)
        await writer.drain()
        writer.close()

    async with listening(babble) as port:
        with pytest.raises(Unavailable):
            await WebhookHttp(LOOPBACK).post(f"http://127.0.0.1:{port}/", {}, b"{}")
    with pytest.raises(Unavailable):
        await WebhookHttp(LOOPBACK).post(f"http://127.0.0.1:{port}/", {}, b"{}")
    with pytest.raises(Unavailable):
        await WebhookHttp(LOOPBACK).post("http://no-such-host.invalid/", {}, b"{}")


async def test_a_name_of_an_internal_address_is_not_called(target: Target) -> None:
    with pytest.raises(FailedPrecondition, match="internal"):
        await WebhookHttp(()).post(target.url.replace("127.0.0.1", "localhost"), {}, b"{}")
    assert target.heard == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "017700000001",
        "127.1",
        "10.1.2.3",
        "169.254.169.254",
        "[::1]",
        "[fe80::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "localhost",
        "a.localhost",
        "0.0.0.0",
        "[fd00::1]",
        "100.64.0.1",
        "[2002:7f00:1::]",
        "224.0.0.1",
    ],
)
async def test_an_internal_address_is_refused_at_once(host: str) -> None:
    async with Fleet().running() as fleet:
        fleet.gateway.use_webhooks(WebhookOptions(sender=WebhookHttp(()), payload=payload, default_key=KEY))
        with pytest.raises(InvalidField):
            await fleet.gateway.jobs.create(replace(generation(), webhook_url=f"http://{host}:8080/"))


async def test_without_a_secret_nobody_is_promised_a_webhook() -> None:
    async with Fleet().running() as fleet:
        fleet.gateway.use_webhooks(WebhookOptions(sender=WebhookHttp(()), payload=payload))
        with pytest.raises(FailedPrecondition):
            await fleet.gateway.jobs.create(replace(generation(), webhook_url="https://example.com/"))


def test_outward_addresses_and_allowed_networks_may_be_called() -> None:
    assert is_allowed(ip_address("93.184.216.34"), ())
    assert is_allowed(ip_address("2606:2800:220:1::1"), ())
    assert is_allowed(ip_address("10.1.2.3"), [ip_network("10.1.0.0/16")])
    assert not is_allowed(ip_address("10.2.2.3"), [ip_network("10.1.0.0/16")])
