"""What clients are promised: jobs created once, listed, watched, waited for, cancelled, and kept for a while."""

import asyncio

import pytest

from fanlight.contract.names import digest_of
from fanlight.errors import AlreadyExists, InvalidField, LeaseLost, NotFound, ResourceExhausted, Unavailable
from services.gateway.app.completion import Renewal
from services.gateway.app.jobs import JobFilter
from services.gateway.app.submission import SourceImage
from services.gateway.app.tenants import OPERATOR
from services.gateway.app.watch import JobPublisher, TaskProgress
from services.gateway.domain.job import DIFFUSION, Job, JobState
from tests.fakes.fleet import Fleet, FleetWorker, annotation, control, generation, photo, seed_of


async def test_a_job_runs_from_input_image_to_output_images(
    fleet: Fleet, annotator: FleetWorker, painter: FleetWorker
) -> None:
    job = await fleet.gateway.jobs.create(generation(2, control()))
    assert [task.state.value for task in job.tasks] == ["queued", "blocked", "blocked"]
    assert await painter.lease() == []
    assert await annotator.work() == 1
    assert await painter.work() == 2
    done = await fleet.get(job)
    assert done.state is JobState.SUCCEEDED
    assert all(task.outputs for task in done.tasks)


async def test_jobs_that_came_later_have_greater_names(fleet: Fleet) -> None:
    names = []
    for _ in range(5):
        names.append((await fleet.gateway.jobs.create(generation())).name)
        fleet.clock.advance(0.01)
    assert names == sorted(names)


async def test_seeds_count_up_from_the_requested_one(fleet: Fleet) -> None:
    job = await fleet.gateway.jobs.create(generation(3, seed=2**64 - 2))
    assert [seed_of(task) for task in job.tasks] == [2**64 - 2, 2**64 - 1, 0]


async def test_drawn_seeds_are_short_and_differ_between_jobs(fleet: Fleet) -> None:
    first = await fleet.gateway.jobs.create(generation())
    second = await fleet.gateway.jobs.create(generation())
    seeds = [seed_of(job.tasks[0]) for job in (first, second)]
    assert seeds[0] != seeds[1]
    assert max(seeds) < 2**32


async def test_the_same_request_id_returns_the_original_job(fleet: Fleet) -> None:
    first = await fleet.gateway.jobs.create(generation(request_id="r"))
    assert (await fleet.gateway.jobs.create(generation(request_id="r"))).name == first.name
    assert len((await fleet.gateway.jobs.list(page_size=0, page_token="")).jobs) == 1


async def test_the_same_request_id_sent_many_times_at_once_creates_one_job(fleet: Fleet) -> None:
    jobs = await asyncio.gather(*(fleet.gateway.jobs.create(generation(request_id="r")) for _ in range(20)))
    assert len({job.name for job in jobs}) == 1


async def test_a_request_id_with_other_content_is_refused(fleet: Fleet) -> None:
    await fleet.gateway.jobs.create(generation(request_id="r"))
    with pytest.raises(AlreadyExists) as refused:
        await fleet.gateway.jobs.create(generation(2, request_id="r"))
    assert refused.value.field == "request_id"


async def test_a_request_whose_gateway_died_before_the_job_was_created_gets_its_job(fleet: Fleet) -> None:
    new = generation(request_id="r")
    claim = fleet.gateway.jobs._requests.claim("r", new.content_digest, "default", "0half")
    assert claim is not None
    await fleet.store.create(claim.bucket, claim.key, claim.value)
    job = await fleet.gateway.jobs.create(new)
    assert job.name == "jobs/0half"
    assert (await fleet.gateway.jobs.create(new)).name == job.name


async def test_what_is_not_an_image_is_refused_by_its_field(fleet: Fleet) -> None:
    bad = SourceImage(field="generation.controls[0].image", data=b"<html>")
    with pytest.raises(InvalidField) as refused:
        await fleet.gateway.jobs._planner._images.keep(bad, OPERATOR)
    assert refused.value.field == bad.field


async def test_an_unknown_digest_is_named(fleet: Fleet) -> None:
    missing = SourceImage(field="annotation.image", digest=digest_of(b"nothing"))
    with pytest.raises(NotFound) as refused:
        await fleet.gateway.jobs._planner._images.keep(missing, OPERATOR)
    assert refused.value.field == "annotation.image.blob.digest"


async def test_too_many_waiting_tasks_are_refused_with_a_delay_and_not_forever() -> None:
    async with Fleet(settings={"waiting_tasks_limit": 3}).running() as fleet:
        painter = fleet.worker(DIFFUSION)
        await fleet.gateway.jobs.create(generation(3))
        with pytest.raises(ResourceExhausted) as refused:
            await fleet.gateway.jobs.create(generation(1))
        assert refused.value.retry_after_s
        await painter.work()
        assert await fleet.gateway.jobs.create(generation(3))


async def test_many_concurrent_requests_do_not_pass_the_bound() -> None:
    async with Fleet(settings={"waiting_tasks_limit": 5}).running() as fleet:
        tries = (fleet.gateway.jobs.create(generation(1, control())) for _ in range(10))
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(result, Job) for result in results) == 2
        assert all(isinstance(result, Job | ResourceExhausted) for result in results)


async def test_a_cancelled_job_leaves_the_queue_and_its_worker_learns_it(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation(2))
    (task,) = await painter.lease()
    cancelled = await fleet.gateway.jobs.cancel(job.name)
    assert cancelled.state is JobState.CANCELLED
    assert (await fleet.gateway.queue.renew("w", [Renewal(token=task.token)]))[0].status == "cancelled"
    with pytest.raises(LeaseLost):
        await painter.complete(task)
    assert await painter.lease(held=[]) == []
    assert (await fleet.gateway.jobs.cancel(job.name)).revision == cancelled.revision


@pytest.mark.parametrize("name", ["jobs/none", "none", "", "tasks/1", "jobs/"])
async def test_an_unknown_job_is_not_found(fleet: Fleet, name: str) -> None:
    for call in (fleet.gateway.jobs.get, fleet.gateway.jobs.cancel):
        with pytest.raises(NotFound):
            await call(name)
    with pytest.raises(NotFound):
        await anext(fleet.gateway.jobs.watch(name))


async def test_jobs_are_listed_newest_first_page_by_page(fleet: Fleet) -> None:
    made = []
    for _ in range(5):
        made.append((await fleet.gateway.jobs.create(generation())).name)
        fleet.clock.advance(1)
    first = await fleet.gateway.jobs.list(page_size=3, page_token="")
    rest = await fleet.gateway.jobs.list(page_size=3, page_token=first.next_token)
    assert [job.name for job in [*first.jobs, *rest.jobs]] == made[::-1]
    assert rest.next_token == ""


async def test_jobs_are_listed_by_state(fleet: Fleet, painter: FleetWorker) -> None:
    for _ in range(4):
        await fleet.gateway.jobs.create(generation())
        fleet.clock.advance(1)
    (task,) = await painter.lease()
    await painter.complete(task)
    page = await fleet.gateway.jobs.list(page_size=2, page_token="", only=JobFilter(state=JobState.SUCCEEDED))
    assert [job.name for job in page.jobs] == [task.job.name]
    assert page.next_token == ""


async def test_a_watch_reports_states_and_progress_until_the_end(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    events = fleet.gateway.jobs.watch(job.name)
    assert await anext(events) == job
    (task,) = await painter.lease()
    assert (await anext(events)).state is JobState.RUNNING
    said = Renewal(token=task.token, progress=TaskProgress(task=0, step=3, steps=20, preview=b"p"))
    await fleet.gateway.queue.renew("w", [said])
    assert await anext(events) == TaskProgress(task=1, step=3, steps=20, preview=b"p")
    assert (await fleet.get(job)).tasks[0].step == 3
    await painter.complete(task)
    assert (await anext(events)).state is JobState.SUCCEEDED
    assert [event async for event in events] == []


def test_a_slow_watcher_gets_the_latest_preview_though_later_progress_has_none() -> None:
    publisher = JobPublisher()
    with publisher.subscribed("a") as quick, publisher.subscribed("a") as slow:
        seen = []
        for step, preview in ((10, b"ten"), (11, b""), (20, b"twenty"), (21, b"")):
            publisher.publish("a", TaskProgress(task=1, step=step, steps=99, preview=preview))
            seen += quick.take()
        # Another image of the job has its own.
        publisher.publish("a", TaskProgress(task=2, step=1, steps=99))
        assert [(each.step, each.preview) for each in seen] == [(10, b"ten"), (11, b""), (20, b"twenty"), (21, b"")]
        assert [(each.step, each.preview) for each in slow.take()] == [(21, b"twenty"), (1, b"")]
        assert slow.take() == []


async def test_a_watch_goes_on_after_the_revision_that_is_known(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    events = fleet.gateway.jobs.watch(job.name, after_revision=job.revision)
    following = asyncio.ensure_future(anext(events))
    await painter.work()
    assert (await following).state is JobState.SUCCEEDED
    done = await fleet.get(job)
    assert [event async for event in fleet.gateway.jobs.watch(job.name, after_revision=done.revision)] == []


async def test_waiting_for_a_job_ends_with_it_or_with_the_wait(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    assert (await fleet.gateway.jobs.wait(job.name, wait_s=0.0)).state is JobState.QUEUED
    waiting = asyncio.ensure_future(fleet.gateway.jobs.wait(job.name, wait_s=20.0))
    await painter.work()
    assert (await waiting).state is JobState.SUCCEEDED


async def test_watches_and_waits_end_when_the_gateway_stops(fleet: Fleet) -> None:
    job = await fleet.gateway.jobs.create(generation())
    events = fleet.gateway.jobs.watch(job.name)
    await anext(events)
    following = asyncio.ensure_future(anext(events))
    waiting = asyncio.ensure_future(fleet.gateway.jobs.wait(job.name, wait_s=20.0))
    await asyncio.sleep(0)
    fleet.gateway.drain()
    with pytest.raises(Unavailable):
        await following
    assert (await waiting).state is JobState.QUEUED


async def test_ended_jobs_are_deleted_by_age_with_their_request_ids(fleet: Fleet, painter: FleetWorker) -> None:
    old = await fleet.gateway.jobs.create(generation(request_id="r"))
    await painter.work()
    fleet.clock.advance(8 * 86_400)
    await painter.come()
    open_job = await fleet.gateway.jobs.create(generation())
    await fleet.gateway.sweep()
    with pytest.raises(NotFound):
        await fleet.get(old)
    assert await fleet.get(open_job)
    assert (await fleet.gateway.jobs.create(generation(request_id="r"))).name != old.name


async def test_ended_jobs_are_deleted_above_a_number() -> None:
    async with Fleet(settings={"job_retention_count": 2}).running() as fleet:
        painter = fleet.worker(DIFFUSION)
        for _ in range(4):
            await fleet.gateway.jobs.create(generation())
            await painter.work()
            fleet.clock.advance(1)
        await fleet.gateway.sweep()
        assert len((await fleet.gateway.jobs.list(page_size=0, page_token="")).jobs) == 2


async def test_everything_is_restored_after_a_restart(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation(2, request_id="r"))
    (task,) = await painter.lease()
    async with fleet.restarted().running() as again:
        assert (await again.get(job)).tasks[0].lease is not None
        assert "starter" in [model.id for model in again.gateway.workers.offers.catalog().models.values()]
        assert (await again.gateway.jobs.create(generation(2, request_id="r"))).name == job.name
        painter.fleet = again
        await painter.complete(task)
        assert await painter.work() == 1
        assert (await again.get(job)).state is JobState.SUCCEEDED


async def test_an_annotation_is_a_job_too(fleet: Fleet, annotator: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(annotation())
    await annotator.work()
    done = await fleet.get(job)
    assert done.state is JobState.SUCCEEDED
    assert done.output_of(done.control_images[0].task) is not None


def test_an_image_does_not_show_its_bytes() -> None:
    assert "PNG" not in repr(SourceImage(field="image", data=photo().data))


async def test_a_page_token_that_no_page_returned_is_refused() -> None:
    async with Fleet().running() as fleet:
        for token in ("zzz", "jobs/1", "0" * 27):
            with pytest.raises(InvalidField) as caught:
                await fleet.gateway.jobs.list(page_size=0, page_token=token)
            assert caught.value.field == "page_token"
        with pytest.raises(InvalidField):
            await fleet.gateway.dead_letters.page(before="zzz", limit=5)
