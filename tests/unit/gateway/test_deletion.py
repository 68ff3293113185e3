"""What is deleted with a job and with a blob, and what stays because somebody needs it."""

from typing import Any

import pytest

from fanlight.errors import FailedPrecondition, LeaseLost, NotFound
from services.gateway.app import control_cache, dead_letters, job_store, webhooks
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Job, JobState
from services.gateway.domain.machine import FAILURES_LIMIT
from tests.fakes.fleet import Fleet, FleetWorker, annotation, control, generation

ACME, GLOBEX = Caller(tenant="acme"), Caller(tenant="globex")


async def done(fleet: Fleet, new: Any, caller: Caller = ACME) -> Job:
    job = await fleet.gateway.jobs.create(new, caller)
    workers = [fleet.worker(PREPROCESS), fleet.worker(DIFFUSION)]
    for worker in workers:
        await worker.come()
    while not (await fleet.get(job)).state.ended:
        for worker in workers:
            await worker.work()
    found = await fleet.get(job)
    assert found.state is JobState.SUCCEEDED
    return found


@pytest.fixture
async def workers(fleet: Fleet) -> list[FleetWorker]:
    found = [fleet.worker(PREPROCESS), fleet.worker(DIFFUSION)]
    for worker in found:
        await worker.come()
    return found


async def count(fleet: Fleet, bucket: str) -> int:
    return len(await fleet.store.list(bucket, limit=100))


async def test_a_deleted_job_takes_its_results_and_records_along(fleet: Fleet, workers: list[FleetWorker]) -> None:
    job = await done(fleet, generation(2, control(), request_id="r"))
    [photo] = job.blobs
    deleted = await fleet.gateway.deletions.delete_job(job.name, ACME)
    # Two images and the control image.
    assert (deleted.blobs, deleted.shared_blobs) == (3, 0)
    with pytest.raises(NotFound):
        await fleet.gateway.jobs.get(job.name, ACME)
    for task in job.tasks:
        assert await fleet.blobs.stat("acme", task.outputs[0].blob.digest) is None
    assert await fleet.blobs.stat("acme", photo.digest) is not None
    assert [await count(fleet, each) for each in (job_store.REQUESTS_BUCKET, control_cache.BUCKET)] == [0, 0]
    # The request id is free again.
    again = await fleet.gateway.jobs.create(generation(2, control(), request_id="r"), ACME)
    assert again.id != job.id


async def test_results_that_another_job_uses_stay_until_that_is_deleted(
    fleet: Fleet, workers: list[FleetWorker]
) -> None:
    first = await done(fleet, generation(1, control()))
    second = await done(fleet, generation(1, control()))
    assert second.control_images[0].cached
    image = second.control_images[0].blob
    assert image is not None
    deleted = await fleet.gateway.deletions.delete_job(first.name, ACME)
    assert deleted.shared_blobs >= 1
    assert await fleet.blobs.stat("acme", image.digest) is not None
    await fleet.gateway.deletions.delete_job(second.name, ACME)
    # The second did not make it, and so does not take it along; without a job it goes by age.
    assert fleet.gateway._core.references.count_of("acme", image.digest) == 0


async def test_a_running_job_is_cancelled_first_and_its_late_result_is_refused(
    fleet: Fleet, workers: list[FleetWorker]
) -> None:
    job = await fleet.gateway.jobs.create(generation(1), ACME)
    [task] = await workers[1].lease()
    await fleet.gateway.deletions.delete_job(job.name, ACME)
    with pytest.raises((LeaseLost, NotFound)):
        await workers[1].complete(task)
    assert await count(fleet, job_store.JOBS_BUCKET) == 0


async def test_dead_letters_and_webhook_deliveries_go_with_their_job(fleet: Fleet, workers: list[FleetWorker]) -> None:
    job = await fleet.gateway.jobs.create(generation(1), ACME)
    for _ in range(FAILURES_LIMIT):
        fleet.rest()
        [task] = await workers[1].lease()
        await workers[1].fail(task)
    assert await count(fleet, dead_letters.BUCKET) == 1
    await fleet.gateway.deletions.delete_job(job.name, ACME)
    assert await count(fleet, dead_letters.BUCKET) == 0
    assert await count(fleet, webhooks.BUCKET) == 0


async def test_a_blob_that_an_open_job_needs_is_not_deleted(fleet: Fleet, workers: list[FleetWorker]) -> None:
    job = await fleet.gateway.jobs.create(annotation(), ACME)
    digest = job.blobs[0].digest
    with pytest.raises(FailedPrecondition, match=job.name):
        await fleet.gateway.deletions.delete_blob("acme", digest, ACME)
    await fleet.gateway.jobs.cancel(job.name, ACME)
    assert await fleet.gateway.deletions.delete_blob("acme", digest, ACME) == 1
    with pytest.raises(NotFound):
        await fleet.gateway.deletions.delete_blob("acme", digest, ACME)


async def test_a_blob_takes_the_cached_control_images_made_of_it_along(
    fleet: Fleet, workers: list[FleetWorker]
) -> None:
    job = await done(fleet, annotation())
    made, photo = job.tasks[0].outputs[0].blob, job.blobs[0]
    assert await count(fleet, control_cache.BUCKET) == 1
    # The job that made it still shows it.
    assert await fleet.gateway.deletions.delete_blob("acme", photo.digest, ACME) == 1
    assert await count(fleet, control_cache.BUCKET) == 0
    assert await fleet.blobs.stat("acme", made.digest) is not None
    # Without that job it goes along.
    second = await done(fleet, annotation())
    await fleet.gateway._core.job_store.forget(job.id)
    await fleet.gateway._core.job_store.forget(second.id)
    assert await fleet.gateway.deletions.delete_blob("acme", photo.digest, ACME) == 2
    assert await fleet.blobs.stat("acme", second.tasks[0].outputs[0].blob.digest) is None


async def test_another_gateway_knows_what_is_used_and_made_of_what(fleet: Fleet, workers: list[FleetWorker]) -> None:
    job = await done(fleet, annotation())
    async with fleet.restarted().running() as other:
        references = other.gateway._core.references
        assert references.count_of("acme", job.blobs[0].digest) == 1
        await other.gateway.deletions.delete_blob("acme", job.blobs[0].digest, ACME)
        assert await count(fleet, control_cache.BUCKET) == 0
        await other.gateway.deletions.delete_job(job.name, ACME)
        assert references.count_of("acme", job.blobs[0].digest) == 0


async def test_an_operator_deletes_any_job_and_tenants_their_own(fleet: Fleet, workers: list[FleetWorker]) -> None:
    job = await fleet.gateway.jobs.create(generation(1), ACME)
    with pytest.raises(NotFound):
        await fleet.gateway.deletions.delete_job(job.name, GLOBEX)
    await fleet.gateway.deletions.delete_job(job.name, OPERATOR)
    with pytest.raises(NotFound):
        await fleet.gateway.jobs.get(job.name)
