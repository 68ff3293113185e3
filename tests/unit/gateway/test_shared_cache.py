"""The cache of control images over several gateways: what one uses, another does not evict."""

import random
from collections.abc import AsyncIterator

import pytest

from services.gateway.app.control_cache import BUCKET, IMAGES, USE_WRITE_INTERVAL_S, LruIndex
from services.gateway.domain.job import PREPROCESS
from tests.fakes.fleet import Fleet, annotation, result
from tests.unit.gateway.test_many_gateways import Pair, told

IMAGE_BYTES = 100


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    settings = {"cache_budget_bytes": 2 * IMAGE_BYTES + 50}
    async with Fleet(is_shared=True, settings=settings).running() as here, here.restarted().running() as there:
        yield here, there


async def ask(fleet: Fleet, name: str) -> bool:
    """Whether its control image was there; made at this gateway where it was not."""
    annotator = fleet.worker(PREPROCESS, name=f"w{fleet.number}")
    await annotator.come()
    job = await fleet.gateway.jobs.create(annotation(name))
    for task in await annotator.lease():
        await annotator.complete(task, image=name.encode() * (IMAGE_BYTES - len(result(64, 64, b""))))
    await told()
    fleet.clock.advance(USE_WRITE_INTERVAL_S + 1)
    return job.state.ended


async def names(fleet: Fleet) -> int:
    return len(await fleet.store.list(BUCKET, limit=9))


async def test_what_is_used_at_one_gateway_is_not_evicted_by_another(pair: Pair) -> None:
    here, there = pair
    await ask(here, "a")
    await ask(here, "b")
    assert await ask(there, "a")
    # No room for three: `b` goes, though `here` has never seen a use of `a`.
    await ask(here, "c")
    assert await names(here) == 2
    assert await ask(here, "a")
    assert not await ask(there, "b")


async def test_a_use_that_has_not_arrived_yet_is_found_in_the_store_before_the_eviction(pair: Pair) -> None:
    here, _ = pair
    await ask(here, "a")
    await ask(here, "b")
    records = {IMAGES.decode(each.value).used_s: each for each in await here.store.list(BUCKET, limit=9)}
    first = records[min(records)]
    # As another gateway would write it, but nobody tells.
    used = IMAGES.encode(
        type(IMAGES.decode(first.value))(
            blob=IMAGES.decode(first.value).blob, width_px=8, height_px=8, used_s=here.clock.now_s()
        )
    )
    bucket = here.store._buckets[BUCKET]
    bucket[first.key] = type(first)(key=first.key, value=used, revision=first.revision + 1)
    await ask(here, "c")
    assert await ask(here, "a")


async def test_a_gateway_that_starts_later_knows_the_last_uses(pair: Pair) -> None:
    here, _ = pair
    await ask(here, "a")
    await ask(here, "b")
    assert await ask(here, "a")
    async with here.restarted().running() as again:
        await ask(again, "c")
        assert await ask(again, "a")


def test_the_oldest_use_is_found_whatever_was_noted_and_dropped() -> None:
    chance = random.Random(5)
    uses, wanted = LruIndex(), dict[str, tuple[float, int, int]]()
    for number in range(20_000):
        key = str(chance.randrange(50))
        if chance.random() < 0.2:
            uses.drop(key)
            wanted.pop(key, None)
        else:
            time_s, size_bytes = float(chance.randrange(1_000)), chance.randrange(100)
            wanted[key] = (max(time_s, wanted.get(key, (0.0,))[0]), number, size_bytes)
            uses.note(key, size_bytes, time_s)
        if wanted:
            assert uses.oldest().key == min(wanted, key=lambda each: wanted[each][:2])
    assert uses.size_bytes == sum(size_bytes for _, _, size_bytes in wanted.values())
    assert len(uses) == len(wanted)
    assert len(uses._heap) <= 2 * len(wanted) + 1_001
