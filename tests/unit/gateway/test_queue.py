"""What workers are promised: leases, batches, renewals, and what becomes of a worker that vanishes."""

import asyncio
from dataclasses import replace

import pytest

from fanlight.contract.names import digest_of
from fanlight.errors import FailedPrecondition, LeaseLost, Unavailable
from services.gateway.app.completion import Renewal, ReportedOutput
from services.gateway.config import GatewayLimits
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Failure, Fault, JobState
from services.gateway.domain.machine import FAILURES_LIMIT, LeaseStatus
from services.gateway.domain.workers import Capabilities
from tests.fakes.fleet import OTHER, STARTER, Fleet, FleetWorker, annotation, control, generation


async def test_a_worker_is_asked_for_unknown_capabilities(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    short = replace(worker.poll(), capabilities=None)
    assert (await fleet.gateway.polls.lease(short)).wants_capabilities
    await worker.come()
    assert not (await fleet.gateway.polls.lease(short)).wants_capabilities
    other = replace(short, capabilities_digest="00")
    assert (await fleet.gateway.polls.lease(other)).wants_capabilities


async def test_a_waiting_poll_is_answered_when_work_appears(fleet: Fleet, painter: FleetWorker) -> None:
    polling = asyncio.ensure_future(painter.lease(wait_s=20.0))
    await asyncio.sleep(0)
    await fleet.gateway.jobs.create(generation())
    assert len(await polling) == 1


async def test_a_waiting_poll_is_answered_when_images_are_unblocked(
    fleet: Fleet, painter: FleetWorker, annotator: FleetWorker
) -> None:
    await fleet.gateway.jobs.create(generation(1, control()))
    polling = asyncio.ensure_future(painter.lease(wait_s=20.0))
    await asyncio.sleep(0)
    await annotator.work()
    assert len(await polling) == 1


async def test_waiting_polls_end_when_the_gateway_stops(fleet: Fleet, painter: FleetWorker) -> None:
    polling = asyncio.ensure_future(painter.lease(wait_s=20.0))
    await asyncio.sleep(0)
    fleet.gateway.drain()
    assert await polling == []
    with pytest.raises(Unavailable):
        await painter.lease()


async def test_an_older_poll_of_the_same_worker_gets_nothing_any_more(fleet: Fleet, painter: FleetWorker) -> None:
    older = asyncio.ensure_future(painter.lease(wait_s=20.0))
    await asyncio.sleep(0)
    newer = asyncio.ensure_future(painter.lease(wait_s=20.0))
    await asyncio.sleep(0)
    await fleet.gateway.jobs.create(generation())
    assert await older == []
    assert len(await newer) == 1


async def test_every_task_is_leased_once_however_many_ask(fleet: Fleet) -> None:
    for _ in range(10):
        await fleet.gateway.jobs.create(generation(3))
    workers = [fleet.worker(DIFFUSION, f"w{i}") for i in range(8)]
    leased = await asyncio.gather(*(worker.lease(limit=5) for worker in workers))
    keys = [(task.job.id, task.task.number) for tasks in leased for task in tasks]
    assert len(keys) == 30
    assert len(set(keys)) == 30


async def test_two_gateways_over_one_store_lease_a_task_once(fleet: Fleet) -> None:
    async with fleet.restarted().running() as other:
        for _ in range(5):
            await fleet.gateway.jobs.create(generation(2))
        here, there = fleet.worker(DIFFUSION, "here"), other.worker(DIFFUSION, "there")
        done = await asyncio.gather(here.work(), there.work())
        assert sum(done) == 10
        jobs = (await other.gateway.jobs.list(page_size=0, page_token="")).jobs
        assert {job.state for job in jobs} == {JobState.SUCCEEDED}
        assert all(task.leases == 1 for job in jobs for task in job.tasks)


async def test_a_batch_holds_compatible_tasks_each_under_its_own_token(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation(2))
    fleet.clock.advance(1)
    await fleet.gateway.jobs.create(generation(1, width_px=512, height_px=512))
    await fleet.gateway.jobs.create(generation(1))
    batch = await painter.lease(limit=8)
    assert len(batch) == 3
    assert len({task.token for task in batch}) == 3
    assert all(task.task.lease.batch_size == 3 for task in batch)


async def test_a_jobs_images_are_shared_among_workers_that_wait(fleet: Fleet) -> None:
    workers = [fleet.worker(DIFFUSION, f"w{i}") for i in range(3)]
    polls = [asyncio.ensure_future(worker.lease(limit=16, wait_s=20.0)) for worker in workers]
    await asyncio.sleep(0)
    await fleet.gateway.jobs.create(generation(6))
    assert [len(await poll) for poll in polls] == [2, 2, 2]


async def test_a_draining_or_full_worker_gets_nothing(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    assert await painter.lease(limit=0) == []
    painter.worker = replace(painter.worker, draining=True)
    assert await painter.lease() == []


async def test_a_worker_gets_only_what_it_offers(fleet: Fleet) -> None:
    small = fleet.worker(DIFFUSION, "small", models=(OTHER,))
    await fleet.gateway.jobs.create(generation())
    assert await small.lease() == []
    assert len(await fleet.worker(DIFFUSION, "big", models=(STARTER,)).lease()) == 1


async def test_a_renewed_lease_lives_on_and_another_expires(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation(2))
    kept, lost = await painter.lease(limit=2)
    fleet.clock.advance(15)
    (answer,) = await fleet.gateway.queue.renew("w", [Renewal(token=kept.token)])
    assert answer.status is LeaseStatus.LIVE
    assert answer.ttl_s > 0
    fleet.clock.advance(10)
    await fleet.gateway.queue.expire_due()
    answers = await fleet.gateway.queue.renew("w", [Renewal(token=kept.token), Renewal(token=lost.token)])
    assert [each.status for each in answers] == [LeaseStatus.LIVE, LeaseStatus.LOST]


async def test_renewing_answers_for_every_token_whatever_it_is(fleet: Fleet) -> None:
    tokens = ["", "nonsense", "a.b.c", "0.1.00", "x.99999.00"]
    answers = await fleet.gateway.queue.renew("w", [Renewal(token=token) for token in tokens])
    assert [each.token for each in answers] == tokens
    assert {each.status for each in answers} == {LeaseStatus.LOST}


async def test_a_worker_that_vanished_loses_its_task_to_another(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    await fleet.expire()
    other = fleet.worker(DIFFUSION, "other")
    (again,) = await other.lease()
    assert again.task.number == task.task.number
    assert again.task.leases == 2
    with pytest.raises(LeaseLost):
        await painter.complete(task)
    await other.complete(again)


async def test_the_tasks_of_a_lost_batch_are_retried_one_by_one(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation(2))
    assert len(await painter.lease(limit=8)) == 2
    await fleet.expire()
    other = fleet.worker(DIFFUSION, "other")
    (alone,) = await other.lease(limit=8)
    assert alone.task.alone


async def test_leases_that_the_worker_does_not_know_of_go_back_at_once(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation(2))
    first, _ = await painter.lease(limit=2)
    (again,) = await painter.lease(limit=8, held=[first.token])
    assert again.task.number == 2
    assert not again.task.alone
    assert (await fleet.gateway.queue.renew("w", [Renewal(token=first.token)]))[0].status is LeaseStatus.LIVE


async def test_a_restarted_gateway_gives_every_lease_its_full_time_to_live(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    fleet.clock.advance(1_000)
    async with fleet.restarted().running() as again:
        await again.gateway.queue.expire_due()
        assert (await again.gateway.queue.renew("w", [Renewal(token=task.token)]))[0].status is LeaseStatus.LIVE
        await again.expire()
        assert (await again.gateway.queue.renew("w", [Renewal(token=task.token)]))[0].status is LeaseStatus.LOST


async def test_a_gateway_that_stood_still_takes_no_lease_for_it(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    fleet.clock.advance(60)
    fleet.gateway._leases.postpone(60)
    await fleet.gateway.queue.expire_due()
    await painter.complete(task)


async def test_completing_twice_with_one_token_makes_one_image(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    await painter.complete(task)
    before = await fleet.get(job)
    painter.held.append(task.token)
    await painter.complete(task)
    assert await fleet.get(job) == before


async def test_an_output_that_was_never_written_is_refused_and_the_lease_stays(
    fleet: Fleet, painter: FleetWorker
) -> None:
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    missing = ReportedOutput(scope="default", digest=digest_of(b"never"), width_px=1, height_px=1)
    with pytest.raises(FailedPrecondition) as refused:
        await fleet.gateway.queue.complete(task.token, [missing], [])
    assert refused.value.field == "outputs[0].blob.digest"
    await painter.complete(task)


async def test_a_failed_node_is_avoided_while_another_live_one_can(fleet: Fleet, painter: FleetWorker) -> None:
    other = fleet.worker(DIFFUSION, "other")
    await other.come()
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    await painter.fail(task)
    fleet.rest(6)
    assert await painter.lease() == []
    assert len(await other.lease()) == 1


async def test_a_failed_node_gets_its_task_again_when_it_is_the_only_one(fleet: Fleet, painter: FleetWorker) -> None:
    other = fleet.worker(DIFFUSION, "other")
    await other.come()
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    await painter.fail(task)
    fleet.rest(1_000)
    assert len(await painter.lease()) == 1


async def test_a_task_that_fails_everywhere_is_a_dead_letter_with_every_reason(fleet: Fleet) -> None:
    job = await fleet.gateway.jobs.create(generation(2))
    for i in range(FAILURES_LIMIT):
        worker = fleet.worker(DIFFUSION, f"w{i}")
        (task,) = await worker.lease()
        assert task.task.number == 1
        await worker.fail(task)
        fleet.rest()
    (letter,) = await fleet.gateway.dead_letters.page(limit=10)
    assert letter.task == f"{job.name}/tasks/1"
    assert [attempt.node for attempt in letter.attempts] == ["w0", "w1", "w2"]
    assert await fleet.gateway.dead_letters.get(letter.task) == letter
    assert (await fleet.get(job)).state is JobState.FAILED


async def test_a_fault_of_the_request_names_the_clients_field(
    fleet: Fleet, annotator: FleetWorker, painter: FleetWorker
) -> None:
    job = await fleet.gateway.jobs.create(generation(1, control("dream"), control("canny")))
    tasks = {task.task.number: task for task in await annotator.lease() + await annotator.lease()}
    wrong = Failure(reason="INVALID_FIELD", message="is cut short", field="image")
    await annotator.fail(tasks[2], Fault.REQUEST, wrong)
    done = await fleet.get(job)
    assert done.failure.field == "generation.controls[1].image"
    assert await fleet.gateway.dead_letters.page(limit=10) == []
    assert (await fleet.gateway.queue.renew("w", [Renewal(token=tasks[1].token)]))[0].status is LeaseStatus.CANCELLED


async def test_a_letter_lost_with_a_dying_gateway_is_written_by_the_next_one(fleet: Fleet) -> None:
    await fleet.gateway.jobs.create(generation())
    worker = fleet.worker(DIFFUSION)
    for _ in range(FAILURES_LIMIT):
        (task,) = await worker.lease()
        await worker.fail(task)
        fleet.rest()
    (letter,) = await fleet.gateway.dead_letters.page(limit=10)
    for record in await fleet.store.list("dead_letters", limit=10):
        await fleet.store.delete("dead_letters", record.key)
    async with fleet.restarted().running() as again:
        await again.gateway.sweep()
        assert await again.gateway.dead_letters.page(limit=10) == [letter]


async def test_a_control_image_is_made_once(fleet: Fleet, annotator: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation(1, control()))
    await annotator.work()
    job = await fleet.gateway.jobs.create(generation(2, control()))
    assert [task.stage for task in job.tasks] == [DIFFUSION, DIFFUSION]
    assert job.control_images[0].cached
    again = await fleet.gateway.jobs.create(annotation(side_px=STARTER.width_px))
    assert again.state is JobState.SUCCEEDED
    assert again.control_images[0].blob == job.control_images[0].blob


@pytest.mark.parametrize(
    "new",
    [annotation("other"), annotation(low=7), annotation(annotator="dream")],
    ids=["image", "parameters", "annotator"],
)
async def test_another_control_image_is_not_taken_for_it(fleet: Fleet, annotator: FleetWorker, new: object) -> None:
    await fleet.gateway.jobs.create(annotation())
    await annotator.work()
    assert len((await fleet.gateway.jobs.create(new)).tasks) == 1


async def test_what_is_not_deterministic_is_not_cached(fleet: Fleet, annotator: FleetWorker) -> None:
    for _ in range(2):
        job = await fleet.gateway.jobs.create(annotation(annotator="dream"))
        assert len(job.tasks) == 1
        await annotator.work()


async def test_a_new_version_of_an_annotator_makes_new_images(fleet: Fleet, annotator: FleetWorker) -> None:
    await fleet.gateway.jobs.create(annotation())
    await annotator.work()
    changed = tuple(replace(each, version="2") for each in annotator.capabilities.annotators)
    annotator.capabilities = Capabilities(annotators=changed)
    await annotator.come()
    assert len((await fleet.gateway.jobs.create(annotation())).tasks) == 1


async def test_a_cached_image_whose_bytes_are_gone_is_made_again(fleet: Fleet, annotator: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(annotation())
    await annotator.work()
    made = (await fleet.get(job)).output_of(1).blob
    await fleet.blobs.delete(made.scope, made.digest)
    assert len((await fleet.gateway.jobs.create(annotation())).tasks) == 1


async def test_the_cache_is_bounded() -> None:
    async with Fleet(limits=GatewayLimits(cache_limit=2)).running() as fleet:
        worker = fleet.worker(PREPROCESS)
        for i in range(4):
            await fleet.gateway.jobs.create(annotation(str(i)))
            await worker.work()
        assert len(await fleet.store.list("control_images", limit=10)) == 2
        assert (await fleet.gateway.jobs.create(annotation("3"))).state is JobState.SUCCEEDED


async def test_statistics_count_what_waits_by_stage_and_checkpoint(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation(2, control()))
    await fleet.gateway.jobs.create(generation(3))
    await painter.lease()
    fleet.clock.advance(5)
    lines = {line.stage: line for line in fleet.gateway.queue.statistics()}
    paint, annotate = lines[DIFFUSION], lines[PREPROCESS]
    assert (paint.checkpoint, paint.waiting, paint.blocked, paint.leased) == ("starter", 2, 2, 1)
    assert (annotate.waiting, annotate.oldest_age_s) == (1, 5.0)


async def test_a_job_that_is_gone_from_the_store_leaves_nothing_behind(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation(2))
    (task,) = await painter.lease()
    await fleet.store.delete("jobs", job.id)
    assert await painter.lease(held=[]) == []
    await fleet.expire()
    assert fleet.gateway.queue.statistics() == []
    with pytest.raises(LeaseLost):
        await painter.complete(task)


async def test_a_poll_that_is_cut_off_leaves_its_worker_able_to_go_on(fleet: Fleet, painter: FleetWorker) -> None:
    polling = asyncio.ensure_future(painter.lease(wait_s=20.0))
    await asyncio.sleep(0)
    polling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await polling
    await fleet.gateway.jobs.create(generation())
    assert len(await painter.lease()) == 1
