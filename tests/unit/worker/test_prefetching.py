"""Models fetched ahead, as the gateway says."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fanlight.errors import Unavailable
from fanlight.queue.v1 import queue_pb2
from services.worker.prefetch import Prefetcher
from tests.fakes.stage import FakeStage


class FetchingStage(FakeStage):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.may_come = asyncio.Semaphore(0)

    async def fetch_ahead(self, model: str, kind: str) -> None:
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


async def test_what_is_more_urgent_interrupts_what_is_under_way(stage: FetchingStage, prefetcher: Prefetcher) -> None:
    prefetcher.want(fetches("checkpoint"))
    await turns()
    prefetcher.want(fetches("lora", "checkpoint"))
    await turns()
    assert stage.asked == ["checkpoint", "lora"]
    stage.may_come.release()
    await turns()
    assert stage.asked == ["checkpoint", "lora", "checkpoint"]


async def test_what_is_wanted_no_more_is_dropped(stage: FetchingStage, prefetcher: Prefetcher) -> None:
    prefetcher.want(fetches("a", "b"))
    await turns()
    prefetcher.want(fetches())
    stage.may_come.release()
    await turns()
    assert stage.asked == ["a"]
    assert not prefetcher.finished.is_set()


async def test_a_fetch_that_fails_is_given_up_and_the_next_one_begun(
    stage: FetchingStage, prefetcher: Prefetcher
) -> None:
    prefetcher.want(fetches("broken", "b"))
    for _ in range(2):
        stage.may_come.release()
        await turns()
    assert stage.asked == ["broken", "b"]
    assert list(prefetcher.unfetched) == ["broken"]


async def test_a_stage_that_cannot_fetch_ahead_is_not_asked_to() -> None:
    prefetcher = Prefetcher(FakeStage())
    assert not prefetcher.is_able
    prefetcher.want(fetches("a"))
