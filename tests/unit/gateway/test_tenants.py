"""A token belongs to a tenant, who sees only its own jobs, blobs and dead letters."""

import tempfile
from pathlib import Path

import pytest

from fanlight.common.v1 import common_pb2
from fanlight.errors import InvalidField, NotFound
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.jobs import JobFilter
from services.gateway.app.tenants import OPERATOR, Caller, Callers, callers_of, read_tenants
from services.gateway.domain.job import DIFFUSION, PREPROCESS, JobState
from services.gateway.domain.keys import KeyRole
from services.gateway.domain.machine import FAILURES_LIMIT
from services.gateway.wire import requests
from services.kernel.config import SettingsError
from tests.fakes.fleet import Fleet, FleetWorker, annotation, control, generation

ACME, GLOBEX = Caller(tenant="acme"), Caller(tenant="globex")


async def test_another_tenants_job_is_not_found(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation(), ACME)
    assert job.tenant == "acme"
    jobs = fleet.gateway.jobs
    for call in (
        jobs.get(job.name, GLOBEX),
        jobs.cancel(job.name, GLOBEX),
        jobs.wait(job.name, wait_s=0, caller=GLOBEX),
    ):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(NotFound):
        await anext(jobs.watch(job.name, caller=GLOBEX))
    assert (await jobs.get(job.name, ACME)).state is JobState.QUEUED
    assert (await jobs.get(job.name, OPERATOR)).name == job.name


async def test_a_tenant_lists_its_own_jobs_and_the_operator_all(fleet: Fleet, painter: FleetWorker) -> None:
    for caller in (ACME, GLOBEX, OPERATOR):
        await fleet.gateway.jobs.create(generation(), caller)

    async def listed(caller: Caller, **only: str) -> set[str]:
        page = await fleet.gateway.jobs.list(page_size=0, page_token="", only=JobFilter(**only), caller=caller)
        return {job.tenant for job in page.jobs}

    assert await listed(ACME) == {"acme"}
    assert await listed(ACME, tenant="globex") == set()
    assert await listed(OPERATOR) == {"acme", "globex", "default"}
    assert await listed(OPERATOR, tenant="globex") == {"globex"}


async def test_a_request_id_that_looks_like_another_tenants_is_ones_own(fleet: Fleet, painter: FleetWorker) -> None:
    """For keys of the operator's own tenant, too, whose request ids have no prefix."""
    staff = Caller(tenant="default", role=KeyRole.SUBMIT)
    theirs = await fleet.gateway.jobs.create(generation(request_id="r"), ACME)
    own = await fleet.gateway.jobs.create(generation(request_id="acme/r"), staff)
    assert (own.tenant, own.id == theirs.id) == ("default", False)
    assert (await fleet.gateway.jobs.create(generation(request_id="acme/r"), staff)).id == own.id
    await fleet.gateway.jobs.create(generation(request_id="acme/q"), staff)
    assert (await fleet.gateway.jobs.create(generation(request_id="q"), ACME)).tenant == "acme"


async def test_request_ids_of_tenants_are_apart(fleet: Fleet, painter: FleetWorker) -> None:
    jobs = [await fleet.gateway.jobs.create(generation(request_id="r"), caller) for caller in (ACME, GLOBEX, ACME)]
    assert jobs[0].id == jobs[2].id != jobs[1].id


async def test_images_and_results_are_in_the_tenants_scope(fleet: Fleet) -> None:
    annotator = fleet.worker(PREPROCESS)
    await annotator.come()
    job = await fleet.gateway.jobs.create(annotation(), ACME)
    assert [blob.scope for blob in job.blobs] == ["acme"]
    await annotator.work()
    done = await fleet.gateway.jobs.get(job.name, ACME)
    assert done.tasks[0].outputs[0].blob.scope == "acme"


async def test_a_control_image_of_one_tenant_is_not_given_to_another(fleet: Fleet, painter: FleetWorker) -> None:
    annotator = fleet.worker(PREPROCESS)
    await annotator.come()
    await fleet.gateway.jobs.create(generation(1, control()), ACME)
    await annotator.work()
    others = [await fleet.gateway.jobs.create(generation(1, control()), caller) for caller in (ACME, GLOBEX)]
    assert [job.control_images[0].cached for job in others] == [True, False]


async def test_a_blob_of_another_scope_is_not_found(fleet: Fleet, painter: FleetWorker) -> None:
    written = fleet.blobs.put(b"\x89PNG\r\n\x1a\nsecret", scope="globex")
    stolen = preprocessor_pb2.AnnotateRequest(annotator="canny")
    annotator = fleet.worker(PREPROCESS)
    await annotator.come()
    for scope in ("globex", "default"):
        stolen.image.blob.CopyFrom(common_pb2.Blob(scope=scope, digest=written.digest))
        new = requests.new_job(gateway_pb2.CreateJobRequest(annotation=stolen), fleet.gateway.workers.offers)
        with pytest.raises(NotFound):
            await fleet.gateway.jobs.create(new, ACME)


async def test_a_worker_that_writes_a_result_into_another_scope_is_refused(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation(), ACME)
    (task,) = await painter.lease()
    with pytest.raises(InvalidField):
        await painter.complete(task, scope="default")
    await painter.complete(task)


async def test_dead_letters_of_another_tenant_are_not_seen(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    await worker.come()
    job = await fleet.gateway.jobs.create(generation(), ACME)
    for _ in range(FAILURES_LIMIT):
        (task,) = await worker.lease()
        await worker.fail(task)
        fleet.rest()
    name = f"{job.name}/tasks/1"
    letters = fleet.gateway.dead_letters
    assert [letter.task for letter in await letters.page(limit=9, caller=ACME)] == [name]
    assert await letters.page(limit=9, caller=GLOBEX) == []
    with pytest.raises(NotFound):
        await fleet.gateway.redrives.redrive(name, GLOBEX)


def test_a_token_is_its_tenants() -> None:
    callers = callers_of("op", read("acme t1\nglobex t2 # two\n"))
    assert callers.of_token("t1") == ACME
    assert callers.of_authorization("Bearer t2") == GLOBEX
    assert callers.of_token("op") == OPERATOR
    assert callers.of_token("") is callers.of_token("t3") is None
    assert Callers().of_token("") == OPERATOR


def read(text: str) -> list:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(text)
        file.flush()
        return read_tenants(Path(file.name))


@pytest.mark.parametrize("text", ["acme", "Acme t", "default t", "a t\na u", "a t\nb t", "a b c d"])
def test_a_file_of_tenants_that_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        read(text)


async def test_a_tenant_sees_how_much_of_its_own_waits_and_not_whose_tasks_a_worker_does() -> None:
    async with Fleet().running() as fleet:
        painter = fleet.worker(DIFFUSION)
        await painter.come()
        await fleet.gateway.jobs.create(generation(2), ACME)
        await painter.lease()
        assert fleet.gateway.queue.statistics(GLOBEX) == []
        assert sum(line.leased + line.waiting for line in fleet.gateway.queue.statistics(ACME)) == 2
        assert sum(line.leased + line.waiting for line in fleet.gateway.queue.statistics()) == 2
        (status,) = fleet.gateway.workers.statuses()
        assert status.tasks
        assert GLOBEX.without_secrets(status).tasks == ()
