"""Prefetch: models that the gateway asks for are downloaded one at a time, and never more than the limit."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fanlight.errors import Unavailable
from fanlight.queue.v1 import queue_pb2
from services.worker.prefetch import WANTED_LIMIT, Prefetcher
from tests.fakes.stage import FakeStage

MORE = 10


class FetchingStage(FakeStage):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.may_come = asyncio.Semaphore(0)

    async def prefetch(self, model: str, kind: str) -> None:
        self.asked.append(model)
        await self.may_come.acquire()
        if model == "broken":
            raise Unavailable("no source has it")


@pytest.fixture
def stage() -> FetchingStage:
    return FetchingStage()


@pytest.fixture
async def prefetcher(stage: FetchingStage) -> AsyncIterator[Prefetcher]:
    prefetcher = Prefetcher(stage)
    running = asyncio.create_task(prefetcher.run())
    yield prefetcher
    running.cancel()


def fetches(*models: str) -> list[queue_pb2.Fetch]:
    return [queue_pb2.Fetch(model=model, kind="lora") for model in models]


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_models_are_fetched_one_after_the_other_and_reported(
    stage: FetchingStage, prefetcher: Prefetcher
) -> None:
    prefetcher.want(fetches("a", "b"))
    await turns()
    assert stage.asked == ["a"]
    assert not prefetcher.finished.is_set()
    stage.may_come.release()
    await turns()
    assert stage.asked == ["a", "b"]
    assert prefetcher.finished.is_set()


async def test_a_more_urgent_model_interrupts_the_running_download(
    stage: FetchingStage, prefetcher: Prefetcher
) -> None:
    prefetcher.want(fetches("checkpoint"))
    await turns()
    prefetcher.want(fetches("lora", "checkpoint"))
    await turns()
    assert stage.asked == ["checkpoint", "lora"]
    stage.may_come.release()
    await turns()
    assert stage.asked == ["checkpoint", "lora", "checkpoint"]


async def test_a_model_that_is_no_longer_wanted_is_dropped(stage: FetchingStage, prefetcher: Prefetcher) -> None:
    prefetcher.want(fetches("a", "b"))
    await turns()
    prefetcher.want(fetches())
    stage.may_come.release()
    await turns()
    assert stage.asked == ["a"]
    assert not prefetcher.finished.is_set()


async def test_after_a_failed_download_the_next_one_starts(stage: FetchingStage, prefetcher: Prefetcher) -> None:
    prefetcher.want(fetches("broken", "b"))
    for _ in range(2):
        stage.may_come.release()
        await turns()
    assert stage.asked == ["broken", "b"]
    assert list(prefetcher.unfetched) == ["broken"]


async def test_a_stage_that_cannot_prefetch_is_not_asked_to() -> None:
    prefetcher = Prefetcher(FakeStage())
    assert not prefetcher.is_able
    prefetcher.want(fetches("a"))


class BrokenStage(FakeStage):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    async def prefetch(self, model: str, kind: str) -> None:
        self.asked.append(model)
        raise Unavailable("no source has it")


def numbered(first: int, end: int) -> list[queue_pb2.Fetch]:
    return [queue_pb2.Fetch(model=f"m{number}", kind="lora") for number in range(first, end)]


async def asked_for(prefetcher: Prefetcher, stage: BrokenStage, wanted: list[queue_pb2.Fetch], count: int) -> None:
    prefetcher.want(wanted)
    async with asyncio.timeout(30):
        while len(stage.asked) < count:  # noqa: ASYNC110 - it ends as soon as the prefetcher has had its turns
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)


async def test_the_limit_bounds_both_prefetches_and_remembered_failures() -> None:
    stage = BrokenStage()
    prefetcher = Prefetcher(stage)
    running = asyncio.create_task(prefetcher.run())
    await asked_for(prefetcher, stage, numbered(0, WANTED_LIMIT + MORE), WANTED_LIMIT)
    assert stage.asked == [f"m{number}" for number in range(WANTED_LIMIT)]
    assert list(prefetcher.unfetched) == stage.asked
    await asked_for(prefetcher, stage, numbered(WANTED_LIMIT, WANTED_LIMIT + MORE), WANTED_LIMIT + MORE)
    assert list(prefetcher.unfetched) == [f"m{number}" for number in range(MORE, WANTED_LIMIT + MORE)]
    running.cancel()
