"""A second node repeats a share of the control images, a third one decides, and the liar is left out."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.gateway.app.control_cache import BUCKET
from services.gateway.app.jobs import ALL_JOBS
from services.gateway.app.tenants import Caller
from services.gateway.domain.job import PREPROCESS, Job
from services.gateway.domain.nodes import Grant
from tests.fakes.fleet import CANNY, Fleet, FleetWorker, annotation, generation

TRUE, FALSE = b"true", b"false"


@pytest.fixture
async def checked() -> AsyncIterator[Fleet]:
    async with Fleet(settings={"checked_share": 1.0}).running() as fleet:
        yield fleet


async def come(fleet: Fleet, *names: str, version: str = "1") -> list[FleetWorker]:
    annotators = (replace(CANNY, version=version),)
    workers = [fleet.worker(PREPROCESS, name, annotators=annotators) for name in names]
    for each in workers:
        await each.come()
    return workers


async def do_one(worker: FleetWorker, image: bytes) -> None:
    (task,) = await worker.lease()
    await worker.complete(task, image)


def checks(fleet: Fleet) -> list[Job]:
    return [job for job in fleet.gateway._core.job_store.open_jobs if job.check is not None]


def is_left_out(worker: FleetWorker) -> bool:
    return "annotator:canny" in {each.need for each in worker.fleet.gateway.workers.avoidances_of(worker.worker.id)}


async def test_another_node_repeats_the_task_and_agrees(checked: Fleet) -> None:
    first, second = await come(checked, "first", "second")
    job = await checked.gateway.jobs.create(annotation())
    await do_one(first, TRUE)
    assert (await checked.get(job)).state.ended, "the client waits for no check"
    (check,) = checks(checked)
    assert await first.lease() == [], "not the node that made it"
    await do_one(second, TRUE)
    assert checks(checked) == []
    assert not is_left_out(first)
    assert await checked.store.get("jobs", check.id) is None


@pytest.mark.parametrize(("images", "liar"), [((FALSE, TRUE, TRUE), 0), ((TRUE, FALSE, TRUE), 1)])
async def test_a_third_node_decides_and_the_liar_is_left_out(
    checked: Fleet, images: tuple[bytes, bytes, bytes], liar: int
) -> None:
    workers = await come(checked, "a", "b", "c")
    await checked.gateway.jobs.create(annotation())
    for worker, image in zip(workers, images, strict=True):
        await do_one(worker, image)
    assert checks(checked) == []
    assert [is_left_out(each) for each in workers] == [i == liar for i in range(3)]
    kept = await checked.store.list(BUCKET, limit=9)
    assert len(kept) == (0 if liar == 0 else 1), "what the liar made is no longer given to anyone"
    (why,) = {each.why for each in checked.gateway.workers.avoidances_of(workers[liar].worker.id)}
    assert "RESULT_FALSE" in why


async def test_a_liar_with_a_credential_is_revoked(checked: Fleet) -> None:
    nodes = checked.gateway.nodes
    _, secret = await nodes.invite(Grant(), uses=3, ttl_s=600.0, comment="")
    (invite,) = await nodes.invites()
    ids = [(await nodes.join_with_code(invite.id, secret, name="n", stages=())).node.id for _ in range(3)]
    workers = await come(checked, *ids)
    await checked.gateway.jobs.create(annotation())
    for worker, image in zip(workers, (FALSE, TRUE, TRUE), strict=True):
        await do_one(worker, image)
    assert [nodes.is_revoked(each) for each in ids] == [True, False, False]
    assert "is not the one that" in nodes.get(ids[0]).reason
    assert (nodes.get(ids[0]).checked_results, nodes.get(ids[0]).false_results) == (1, 1)


async def test_without_a_third_node_nobody_is_left_out(checked: Fleet) -> None:
    workers = await come(checked, "a", "b")
    await checked.gateway.jobs.create(annotation())
    await do_one(workers[0], FALSE)
    await do_one(workers[1], TRUE)
    assert checks(checked) == []
    assert not any(is_left_out(each) for each in workers)


async def test_three_nodes_of_which_no_two_agree_are_all_left_in(checked: Fleet) -> None:
    workers = await come(checked, "a", "b", "c")
    await checked.gateway.jobs.create(annotation())
    for worker, image in zip(workers, (b"1", b"2", b"3"), strict=True):
        await do_one(worker, image)
    assert not any(is_left_out(each) for each in workers)


async def test_only_nodes_with_the_same_build_are_compared(checked: Fleet) -> None:
    (first,) = await come(checked, "first")
    await come(checked, "other", version="2")
    await checked.gateway.jobs.create(annotation())
    await do_one(first, TRUE)
    assert checks(checked) == []
    (second,) = await come(checked, "second")
    (other,) = await come(checked, "third", version="2")
    await checked.gateway.jobs.create(annotation("b"))
    await do_one(first, TRUE)
    assert await other.lease() == []
    assert len(await second.lease()) == 1


async def test_what_is_not_deterministic_is_not_checked(checked: Fleet) -> None:
    for name in ("a", "b"):
        worker = checked.worker(PREPROCESS, name)
        await worker.come()
    await checked.gateway.jobs.create(annotation(annotator="dream"))
    await do_one(worker, TRUE)
    assert checks(checked) == []


async def test_clients_see_no_checks_and_go_before_them(checked: Fleet) -> None:
    first, second = await come(checked, "first", "second")
    acme = Caller(tenant="acme")
    await checked.gateway.jobs.create(annotation(), acme)
    await do_one(first, TRUE)
    (check,) = checks(checked)
    assert not acme.sees(check)
    assert not ALL_JOBS.matches(check)
    assert check.tenant == "acme", "its worker reads the tenant's image"
    first.worker = replace(first.worker, draining=True)
    await first.come()
    job = await checked.gateway.jobs.create(annotation("later"))
    (task,) = await second.lease()
    assert task.job.id == job.id
    (task,) = await second.lease()
    assert task.job.id == check.id


async def test_without_a_share_nothing_is_checked(fleet: Fleet) -> None:
    first, _ = await come(fleet, "first", "second")
    await fleet.gateway.jobs.create(annotation())
    await do_one(first, TRUE)
    assert checks(fleet) == []


async def test_a_check_that_nobody_does_ends_by_itself(checked: Fleet) -> None:
    first, second = await come(checked, "first", "second")
    await checked.gateway.jobs.create(annotation())
    await do_one(first, TRUE)
    checked.rest(4_000.0)
    await checked.gateway.queue.end_late_jobs()
    assert checks(checked) == []
    assert await second.lease() == []


async def test_images_are_not_checked(checked: Fleet) -> None:
    painters = [checked.worker("diffusion", name) for name in ("a", "b")]
    for each in painters:
        await each.come()
    await checked.gateway.jobs.create(generation())
    await do_one(painters[0], TRUE)
    assert checks(checked) == []
