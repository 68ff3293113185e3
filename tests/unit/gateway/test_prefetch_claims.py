"""Of several gateways only one has a checkpoint prefetched."""

from services.gateway.app.prefetch import BUCKET, PrefetchClaims
from services.gateway.app.records import Records
from services.gateway.scheduler.schedule import Scheduler
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore
from tests.fakes.scheduler import a_task, a_view


def a_gateway(store: MemoryStore, clock: FakeClock, *workers: str) -> tuple[Scheduler, PrefetchClaims]:
    board = Scheduler()
    for worker in workers:
        board.seen(a_view(worker, held=frozenset()), clock.monotonic_s())
        board.asks(worker, clock.monotonic_s())
    return board, PrefetchClaims(Records(store, clock), board, clock)


def models(board: Scheduler, worker: str) -> list[str]:
    return [fetch.model for fetch in board.fetches(worker)]


async def test_a_checkpoint_is_prefetched_once_for_all_gateways() -> None:
    store, clock = MemoryStore(), FakeClock()
    here, claims_here = a_gateway(store, clock, "1", "2")
    there, claims_there = a_gateway(store, clock, "2", "1")
    for board in (here, there):
        board.add(a_task("t"), clock.monotonic_s())
    await claims_here.claim()
    await claims_there.claim()
    fetching = [worker for worker in ("1", "2") if "a" in models(here, worker) or "a" in models(there, worker)]
    assert len(fetching) == 1
    assert here.planned_at(("t", 1)).view.id == there.planned_at(("t", 1)).view.id == fetching[0]


async def test_a_claim_whose_worker_never_finished_can_be_taken_over() -> None:
    store, clock = MemoryStore(), FakeClock()
    here, claims = a_gateway(store, clock, "1")
    here.add(a_task("t"), clock.monotonic_s())
    await claims.claim()
    there, later = a_gateway(store, clock, "2")
    clock.advance(10_000)
    there.add(a_task("t"), clock.monotonic_s())
    await later.claim()
    assert models(there, "2") == ["a"]


async def test_claims_that_ended_are_deleted() -> None:
    store, clock = MemoryStore(), FakeClock()
    board, claims = a_gateway(store, clock, "1")
    board.add(a_task("t"), clock.monotonic_s())
    await claims.claim()
    await claims.sweep()
    assert len(await store.list(BUCKET, limit=10)) == 1
    clock.advance(10_000)
    await claims.sweep()
    assert await store.list(BUCKET, limit=10) == []
