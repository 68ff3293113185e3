"""What a gateway may have a worker remember, however much it asks for."""

import asyncio

from fanlight.errors import Unavailable
from fanlight.queue.v1 import queue_pb2
from services.worker.prefetch import WANTED_LIMIT, Prefetcher
from tests.fakes.stage import FakeStage

MORE = 10


class BrokenStage(FakeStage):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    async def fetch_ahead(self, model: str, kind: str) -> None:
        self.asked.append(model)
        raise Unavailable("no source has it")


def fetches(first: int, end: int) -> list[queue_pb2.Fetch]:
    return [queue_pb2.Fetch(model=f"m{number}", kind="lora") for number in range(first, end)]


async def asked_for(prefetcher: Prefetcher, stage: BrokenStage, wanted: list[queue_pb2.Fetch], count: int) -> None:
    prefetcher.want(wanted)
    async with asyncio.timeout(30):
        while len(stage.asked) < count:  # noqa: ASYNC110 - it ends as soon as the prefetcher has had its turns
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)


async def test_no_more_is_fetched_ahead_than_the_limit_and_no_more_failures_are_remembered() -> None:
    stage = BrokenStage()
    prefetcher = Prefetcher(stage)
    running = asyncio.create_task(prefetcher.run())
    await asked_for(prefetcher, stage, fetches(0, WANTED_LIMIT + MORE), WANTED_LIMIT)
    assert stage.asked == [f"m{number}" for number in range(WANTED_LIMIT)]
    assert list(prefetcher.unfetched) == stage.asked
    await asked_for(prefetcher, stage, fetches(WANTED_LIMIT, WANTED_LIMIT + MORE), WANTED_LIMIT + MORE)
    assert list(prefetcher.unfetched) == [f"m{number}" for number in range(MORE, WANTED_LIMIT + MORE)]
    running.cancel()
