"""A record of any bucket that cannot be read is set aside, reported once, counted, shown and removed."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from fanlight.cli.main import run
from fanlight.client import AsyncClient
from fanlight.errors import FanlightError
from services.gateway.app import dead_letters
from services.gateway.app.gateway import BUCKETS
from services.gateway.app.records import FORMAT_VERSION
from services.gateway.app.tenants import Tenant, callers_of
from services.gateway.domain.job import DIFFUSION, JobState
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.kernel.config import GatewayCommonSettings
from tests.fakes.fleet import Fleet, generation
from tests.fakes.rpc_gateway import serving

GARBAGE = b'{"version":%d,"value":[null]}' % FORMAT_VERSION
# Where a starting gateway reads them; prefetches are overwritten and deleted instead.
FOUND = [bucket for bucket in BUCKETS if bucket != "prefetches"]
OPERATOR, ACME = "op", "a"


async def with_garbage(fleet: Fleet) -> None:
    for bucket in BUCKETS:
        await fleet.store.create(bucket, "0damaged", GARBAGE)


async def settled(fleet: Fleet) -> None:
    """Until the gateway has looked at every bucket."""
    for _ in range(1_000):
        await asyncio.sleep(0)
        await fleet.gateway.jobs.list(page_size=1, page_token="")
    assert set(fleet.gateway.records.damaged_counts) == set(FOUND)


@pytest.fixture
async def damaged() -> AsyncIterator[Fleet]:
    fleet = Fleet(is_shared=True)
    await with_garbage(fleet)
    async with fleet.running():
        await settled(fleet)
        yield fleet


async def test_a_gateway_starts_lists_and_works_with_a_damaged_record_in_every_bucket(damaged: Fleet) -> None:
    worker = damaged.worker(DIFFUSION)
    await worker.come()
    job = await damaged.gateway.jobs.create(generation())
    assert await worker.work() == 1
    assert (await damaged.get(job)).state is JobState.SUCCEEDED
    assert [each.name for each in (await damaged.gateway.jobs.list(page_size=9, page_token="")).jobs] == [job.name]
    assert await damaged.gateway.dead_letters.page(limit=9) == []
    await damaged.gateway.sweep()


async def test_each_damaged_record_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet(is_shared=True)
    await with_garbage(fleet)
    async with fleet.running():
        await settled(fleet)
        for _ in range(3):
            await fleet.gateway.jobs.list(page_size=9, page_token="")
            await fleet.gateway.dead_letters.page(limit=9)
            await fleet.gateway.records.verify()
    said = [line for line in capsys.readouterr().out.splitlines() if "unreadable_record_skipped" in line]
    assert sorted(line.split("bucket=")[1].split()[0] for line in said) == sorted(FOUND)


async def test_what_is_mended_is_forgotten(damaged: Fleet) -> None:
    await damaged.store.delete("faults", "0damaged")
    record = await damaged.store.get("dead_letters", "0damaged")
    assert record is not None
    letter = dead_letters.DeadLetter(
        task="jobs/a/tasks/1",
        stage=DIFFUSION,
        time_s=1.0,
        failure=dead_letters.Failure(reason="A", message="b"),
        attempts=(),
    )
    await damaged.store.put("dead_letters", "0damaged", dead_letters.LETTERS.encode(letter), revision=record.revision)
    await damaged.gateway.records.verify()
    assert set(damaged.gateway.records.damaged_counts) == set(FOUND) - {"faults", "dead_letters"}


async def test_the_client_lists_shows_and_removes_them(damaged: Fleet) -> None:
    async with serving(damaged) as address, AsyncClient(address) as client:
        listed = await client.list_damaged_records(limit=100)
        assert [each.name for each in listed] == sorted((f"{each}/0damaged" for each in FOUND), reverse=True)
        assert [each.name for each in await client.list_damaged_records(limit=2)] == [each.name for each in listed[:2]]
        shown = await client.get_damaged_record("faults/0damaged")
        assert (shown.value, shown.size_bytes) == (GARBAGE, len(GARBAGE))
        assert "Input should be" in shown.why
        await client.remove_damaged_record("faults/0damaged")
        assert await damaged.store.get("faults", "0damaged") is None
        for name in ("faults/0damaged", "jobs/none", "none", ""):
            with pytest.raises(FanlightError, match="there is no such damaged record"):
                await client.get_damaged_record(name)
        assert len(await client.list_damaged_records()) == len(FOUND) - 1


async def test_a_record_that_can_be_read_is_never_removed(damaged: Fleet) -> None:
    await damaged.worker(DIFFUSION).come()
    job = await damaged.gateway.jobs.create(generation())
    with pytest.raises(FanlightError, match="there is no such damaged record"):
        await damaged.gateway.records.remove_damaged("jobs", job.id)
    assert await damaged.store.get("jobs", job.id)


async def test_only_the_operator_sees_them_over_grpc(damaged: Fleet) -> None:
    settings = GatewayCommonSettings(client_token=OPERATOR, worker_token="w", drain_grace_s=0)
    async with serving(damaged, settings, [Tenant(name="acme", token=ACME)]) as address:
        for token, words in ((ACME, "only operators may do"), ("w", "send the right token"), ("", "the right token")):
            async with AsyncClient(address, token=token) as client:
                with pytest.raises(FanlightError, match=words):
                    await client.list_damaged_records()
        async with AsyncClient(address, token=OPERATOR) as client:
            assert len(await client.list_damaged_records()) == len(FOUND)


async def test_they_are_counted_listed_and_removed_over_http(damaged: Fleet) -> None:
    app = http_app(
        damaged.gateway, damaged.blobs, HttpOptions(callers=callers_of(OPERATOR, [Tenant(name="acme", token=ACME)]))
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        operator, tenant = ({"authorization": f"Bearer {token}"} for token in (OPERATOR, ACME))
        assert (await http.get("/v1/damaged-records", headers=tenant)).status_code == 403
        assert (await http.delete("/v1/damaged-records/faults/0damaged", headers=tenant)).status_code == 403
        listed = (await http.get("/v1/damaged-records?page_size=3", headers=operator)).json()
        assert len(listed["records"]) == 3
        assert listed["next_page_token"] == listed["records"][-1]["name"]
        assert 'fanlight_damaged_records{bucket="faults"} 1.0' in (await http.get("/metrics", headers=operator)).text
        path = "/v1/damaged-records/faults/0damaged"
        assert "value" in (await http.get(path, headers=operator)).json()
        assert (await http.delete(path, headers=operator)).status_code == 200
        assert (await http.get(path, headers=operator)).status_code == 404
        assert 'bucket="faults"' not in (await http.get("/metrics", headers=operator)).text


async def test_the_command_lists_shows_and_removes_them(damaged: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()

    async def said(*arguments: str) -> str:
        code = await asyncio.to_thread(run, ["records", *arguments, "--gateway", address])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    async with serving(damaged) as address:
        assert len((await said("list")).splitlines()) == 1 + len(FOUND)
        shown = await said("show", "deliveries/0damaged")
        assert GARBAGE.decode() in shown
        assert (await said("remove", "deliveries/0damaged")).splitlines()[-1] == "removed deliveries/0damaged"
        assert "deliveries" not in await said("list", "--json")
