"""What a worker holds: bounded before anything is built of it, and sent only when it changed."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fanlight.errors import InvalidField
from fanlight.queue.v1 import queue_pb2
from services.gateway.app.leasing import PollAnswer
from services.gateway.domain.job import DIFFUSION
from services.gateway.wire import workers
from tests.fakes.fleet import Fleet, FleetWorker

PLACES = ("vram_models", "ram_models", "disk_models", "unfetched_models")


class Untouchable(Sequence[str]):
    """Names of which none may be looked at."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: object) -> str:  # type: ignore[override]
        raise AssertionError("it was read")


def test_too_many_models_are_refused_before_any_is_looked_at() -> None:
    with pytest.raises(InvalidField, match="has 1000000 models; at most 20000"):
        workers._models(Untouchable(), "worker.disk_models")


@pytest.mark.parametrize("place", PLACES)
def test_too_many_models_in_any_place_are_refused(place: str) -> None:
    worker = queue_pb2.Worker(id="w", node="n", stage="diffusion", **{place: ["m"] * 20_001})
    with pytest.raises(InvalidField) as refused:
        workers.poll(queue_pb2.LeaseTasksRequest(worker=worker))
    assert refused.value.field == f"worker.{place}"


def test_a_long_digest_is_refused() -> None:
    worker = queue_pb2.Worker(id="w", node="n", stage="diffusion")
    with pytest.raises(InvalidField) as refused:
        workers.poll(queue_pb2.LeaseTasksRequest(worker=worker, holdings_digest=bytes(65)))
    assert refused.value.field == "holdings_digest"


async def poll(worker: FleetWorker, digest: str, *held: str, unchanged: bool = False) -> PollAnswer:
    asked = worker.poll(limit=0)
    said = replace(asked.worker, disk_models=frozenset(held))
    return await worker.fleet.gateway.polls.lease(
        replace(asked, worker=said, holdings_digest=digest, holdings_unchanged=unchanged)
    )


def holds(worker: FleetWorker) -> frozenset[str]:
    (status,) = worker.fleet.gateway.workers.statuses()
    return status.worker.disk_models


async def test_lists_that_did_not_change_need_not_be_sent_again(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    assert (await poll(worker, "d1", "starter")).holdings_digest == "d1"
    assert (await poll(worker, "d1", unchanged=True)).holdings_digest == "d1"
    assert holds(worker) == {"starter"}
    assert (await poll(worker, "d2", "other")).holdings_digest == "d2"
    assert holds(worker) == {"other"}


@pytest.mark.parametrize("digest", ["d2", ""])
async def test_lists_that_are_not_known_are_asked_for(fleet: Fleet, digest: str) -> None:
    worker = fleet.worker(DIFFUSION)
    assert await poll(worker, "d1", unchanged=True) == PollAnswer()
    await poll(worker, "d1", "starter")
    assert await poll(worker, digest, unchanged=True) == PollAnswer()
    assert holds(worker) == {"starter"}


async def test_a_worker_that_sends_no_digest_sends_its_lists(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    await poll(worker, "", "starter")
    assert (await poll(worker, "", "other")).holdings_digest == ""
    assert holds(worker) == {"other"}


async def test_another_gateway_asks_for_them(fleet: Fleet) -> None:
    await poll(fleet.worker(DIFFUSION), "d1", "starter")
    async with fleet.restarted().running() as again:
        assert await poll(again.worker(DIFFUSION), "d1", unchanged=True) == PollAnswer()
