"""Records of another format version are refused when the gateway starts; damaged ones are skipped."""

import asyncio
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanlight.channel import open_channel
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, FanlightError
from fanlight.gateway.v1 import gateway_pb2
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.completion import Renewal
from services.gateway.app.gateway import BUCKETS
from services.gateway.app.job_store import JOBS, JOBS_BUCKET
from services.gateway.app.records import FORMAT_VERSION, OtherFormatVersion, UnreadableRecord
from services.gateway.domain import plan
from services.gateway.domain.job import (
    DIFFUSION,
    Attempt,
    ControlImage,
    Ending,
    Input,
    Job,
    JobState,
    Lease,
    Output,
    TaskState,
)
from services.gateway.domain.machine import LeaseStatus
from services.gateway.ports import Record
from tests.fakes.fleet import Fleet, FleetWorker, generation
from tests.fakes.gateway_process import jobs_of
from tests.fakes.jobs import blob, generation_plan
from tests.fakes.rpc_gateway import serving

# As the release before wrote a job.
OLD = b'{"version":1,"value":{"id":"0000","state":"queued","create_time_s":1.0,"priority":0,"work":{}}}'
START_LIMIT_S = 60


def test_a_job_survives_its_record() -> None:
    job = plan.create(generation_plan(2, "canny"), job_id="j", request_id="r", priority=1, now_s=5.0)
    assert JOBS.decode(JOBS.encode(job)) == job


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (OLD, OtherFormatVersion, "format version 1; this gateway reads version 2"),
        (b'{"version":3,"value":{}}', OtherFormatVersion, "format version 3"),
        (b'{"version":2,"value":{"id":5}}', UnreadableRecord, "id: Input should be a valid string"),
        (b'{"version":2,"value":', UnreadableRecord, "Invalid JSON"),
        (b"", UnreadableRecord, "not a record of Fanlight"),
        (b"\xff\xfe garbage", UnreadableRecord, "not a record of Fanlight"),
        (b"[2]", UnreadableRecord, "not a record of Fanlight"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, kind: type[UnreadableRecord], words: str) -> None:
    with pytest.raises(FailedPrecondition, match=words) as caught:
        JOBS.decode(data)
    assert type(caught.value) is kind


def damaged(**changes: Any) -> Job:
    """A job of an annotation and two images; `changes` of its second task by their names, of the job after `job_`."""
    job = plan.create(generation_plan(2, "canny"), job_id="j", request_id="r", priority=1, now_s=5.0)
    of_job = {name.removeprefix("job_"): value for name, value in changes.items() if name.startswith("job_")}
    of_task = {name: value for name, value in changes.items() if not name.startswith("job_")}
    tasks = (job.tasks[0], replace(job.tasks[1], **of_task), *job.tasks[2:])
    return replace(job, **{"tasks": tasks, **of_job})


LOST = Attempt(worker="w", node="n", lease_time_s=1e300, end_time_s=1.0, ending=Ending.LOST)
UNDATED = Lease(token="t", worker="w", node="n", time_s=-1.0)
OUTPUT = Output(blob=blob("made"), width_px=2**32, height_px=8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job_requests": ()}, "requests: are none"),
        ({"job_control_images": (ControlImage(task=4),)}, "control_images.0.task: is 4; the tasks are 1 to 3"),
        ({"job_control_images": (ControlImage(task=-1),)}, "control_images.0.task: is -1"),
        ({"job_revision": -1}, "revision: is -1"),
        ({"job_redrives": 2**32}, "redrives: is 4294967296"),
        ({"job_priority": 2**31}, "priority: is 2147483648"),
        ({"job_create_time_s": 1e300}, "create_time_s: is 1e"),
        ({"job_end_time_s": 1e300}, "end_time_s: is 1e"),
        ({"job_state": JobState.FAILED}, "state: is failed, which its tasks contradict"),
        ({"job_tasks": (), "job_control_images": ()}, "state: is queued, which its tasks contradict"),
        ({"number": 3}, "tasks.1.number: is 3; must be 2"),
        ({"request": 3}, "tasks.1.request: is 3; there are 3 requests"),
        ({"request": -1}, "tasks.1.request: is -1"),
        ({"request": 1}, "tasks.1.stage: is diffusion, and its request's is preprocess"),
        ({"inputs": (Input(field="image", task=99),)}, "tasks.1.inputs.0.task: is 99"),
        ({"inputs": (Input(field="image", task=-1),)}, "tasks.1.inputs.0.task: is -1"),
        ({"inputs": (Input(field="image", task=2),)}, "tasks.1.inputs.0.task: is 2; must be another one"),
        ({"inputs": (Input(field="image"),)}, "tasks.1.inputs.0: has neither a task nor a blob"),
        ({"state": TaskState.QUEUED}, "tasks.1.inputs.0.task: is 1, which has no output, and the task is queued"),
        ({"state": TaskState.LEASED, "inputs": ()}, "tasks.1.lease: is missing"),
        ({"dead": True}, "tasks.1.failure: is missing"),
        ({"leases": -1}, "tasks.1.leases"),
        ({"forgiven": 1}, "tasks.1.leases, forgiven: are 0 and 1 of 0 attempts"),
        ({"queue_time_s": -1.0}, "tasks.1.queue_time_s: is -1.0"),
        ({"lease": UNDATED}, "tasks.1.lease.time_s: is -1.0"),
        ({"attempts": (LOST,)}, "tasks.1.attempts.0.lease_time_s: is 1e"),
        ({"outputs": (OUTPUT,)}, "tasks.1.outputs.0.width_px: is 4294967296"),
        ({"outputs": (replace(OUTPUT, width_px=8, seed=2**64),)}, "tasks.1.outputs.0.seed: is 18446744073709551616"),
    ],
)
def test_a_job_that_cannot_be_is_unreadable(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnreadableRecord, match=re.escape(words)):
        JOBS.decode(JOBS.encode(damaged(**changes)))


def test_a_number_that_no_gateway_could_read_again_is_never_stored() -> None:
    with pytest.raises(FanlightError, match="would be stored as a record that cannot be read: deadline_s: "):
        JOBS.encode(damaged(job_deadline_s=float("nan")))


def test_a_state_that_no_gateway_knows_is_unreadable() -> None:
    data = JOBS.encode(damaged()).replace(b'"blocked"', b'"resting"')
    with pytest.raises(UnreadableRecord, match=r"tasks\.1\.state: Input should be 'blocked', 'queued'"):
        JOBS.decode(data)


def test_a_job_under_another_jobs_key_is_unreadable() -> None:
    with pytest.raises(UnreadableRecord, match="id: is 'j', and the record's key is 'k'"):
        JOBS.decode_record(Record(key="k", value=JOBS.encode(damaged()), revision=1))


@pytest.mark.parametrize("bucket", BUCKETS)
async def test_a_store_of_another_format_version_is_refused_by_the_name_of_what_has_it(bucket: str) -> None:
    fleet = Fleet()
    await fleet.store.create(bucket, "0000", OLD)
    with pytest.raises(
        OtherFormatVersion,
        match=f"{bucket} have format version 1; this gateway reads and writes version {FORMAT_VERSION}",
    ):
        await fleet.gateway.load()


async def test_a_gateway_over_a_store_of_another_format_version_says_so_in_one_line_and_ends(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / "gateway.sqlite") as store:
        await store.create(JOBS_BUCKET, "0000", OLD)
    settings = {
        "FANLIGHT_GATEWAY_DATA_DIR": str(tmp_path),
        "FANLIGHT_GATEWAY_GRPC": "127.0.0.1:0",
        "FANLIGHT_GATEWAY_HTTP": "127.0.0.1:0",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **settings},
    )
    async with asyncio.timeout(START_LIMIT_S):
        out, said = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    (line,) = said.decode().splitlines()
    place = tmp_path / "gateway.sqlite"
    assert line.startswith(f"error: {place}: another version of Fanlight wrote this store")
    assert f"mv {place} {place}.old" in line
    assert "FANLIGHT_GATEWAY_DATA_DIR" in line
    async with open_sqlite_store(place) as store:
        record = await store.get(JOBS_BUCKET, "0000")
    assert record is not None
    assert record.value == OLD, "what was there is left as it was"


async def test_a_damaged_job_is_skipped_and_the_others_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    first = Fleet()
    async with first.running():
        await first.worker(DIFFUSION).come()
        damaged, whole = [await first.gateway.jobs.create(generation()) for _ in range(2)]
    record = await first.store.get(JOBS_BUCKET, damaged.id)
    assert record is not None
    await first.store.put(JOBS_BUCKET, damaged.id, record.value[:-9] + b"}", revision=record.revision)
    async with first.restarted().running() as fleet:
        page = await fleet.gateway.jobs.list(page_size=10, page_token="")
        assert [job.name for job in page.jobs] == [whole.name]
        with pytest.raises(UnreadableRecord):
            await fleet.gateway.jobs.get(damaged.name)
        assert await fleet.worker(DIFFUSION).work() == 1
        assert (await fleet.get(whole)).state is JobState.SUCCEEDED
        assert await fleet.gateway.jobs.create(generation())
    (line,) = {
        each
        for each in capsys.readouterr().out.splitlines()
        if "unreadable_record_skipped" in each and damaged.id in each
    }
    assert "bucket=jobs" in line


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value[:-20],
        lambda value: value.replace(b'"request":0', b'"request":7'),
    ],
    ids=["truncated", "absurd"],
)
async def test_a_job_that_is_damaged_while_it_is_open_is_set_aside(
    spoil: Callable[[bytes], bytes], fleet: Fleet, painter: FleetWorker
) -> None:
    job = await fleet.gateway.jobs.create(generation(2))
    tasks = await painter.lease(limit=1)
    record = await fleet.store.get(JOBS_BUCKET, job.id)
    assert record is not None
    # Written by something that knows no revisions: older than what the gateway has.
    damaged = Record(key=job.id, value=spoil(record.value), revision=record.revision - 1)
    assert damaged.value != record.value
    fleet.store._buckets[JOBS_BUCKET][job.id] = damaged
    await fleet.expire()
    assert await painter.lease(held=[]) == []
    with pytest.raises(UnreadableRecord):
        await fleet.gateway.jobs.get(job.name)
    (answer,) = await fleet.gateway.queue.renew(painter.worker.id, [Renewal(token=tasks[0].token)])
    assert answer.status is LeaseStatus.LOST
    other = await fleet.gateway.jobs.create(generation())
    assert await painter.work() == 1
    assert (await fleet.get(other)).state is JobState.SUCCEEDED


async def with_message(fleet: Fleet, job: Job, **changes: Any) -> None:
    """Change the job's first request in the store and in the gateway, which stays otherwise as it is."""
    first = replace(job.requests[0], **changes)
    tasks = tuple(replace(each, stage=first.stage) for each in job.tasks)
    await fleet.gateway._core.job_store.change(
        job.id, lambda job: replace(job, requests=(first, *job.requests[1:]), tasks=tasks, revision=job.revision + 1)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"message": b"\xff\xff"}, "its message is no fanlight.diffusion.v1.GenerateRequest"),
        ({"stage": "unknown"}, "this gateway knows no stage 'unknown'"),
    ],
)
async def test_a_task_whose_message_cannot_be_read_fails_with_a_reason_and_stops_no_poll(
    changes: dict[str, Any], words: str, fleet: Fleet
) -> None:
    await fleet.worker(DIFFUSION).come()
    broken, sound = [await fleet.gateway.jobs.create(generation()) for _ in range(2)]
    await with_message(fleet, broken, **changes)
    async with serving(fleet) as address, open_channel(address) as channel:
        polls, jobs = queue_pb2_grpc.QueueServiceStub(channel), jobs_of(channel)
        worker = queue_pb2.Worker(id="w", node="w", stage=DIFFUSION, disk_models=["starter"])
        offers = queue_pb2.Capabilities(
            models=[diffusion_pb2.Model(id="starter", kind="checkpoint")],
            offers=sorted(broken.requests[0].facts.needs - {"checkpoint:starter"}),
        )
        request = queue_pb2.LeaseTasksRequest(worker=worker, capabilities=offers, capabilities_digest=b"d", max_tasks=1)
        assert [task.name for task in (await polls.LeaseTasks(request)).tasks] == [f"{sound.name}/tasks/1"]
        shown = await jobs.GetJob(gateway_pb2.GetJobRequest(name=broken.name))
        assert shown.state == gateway_pb2.Job.STATE_FAILED
        assert (shown.failure.reason, shown.HasField("generation")) == ("UNREADABLE_RECORD", False)
        assert words in shown.failure.message
        listed = await jobs.ListJobs(gateway_pb2.ListJobsRequest())
        assert {each.name for each in listed.jobs} == {broken.name, sound.name}


@pytest.mark.parametrize("bucket", [*BUCKETS, "heartbeats"])
@pytest.mark.parametrize("is_shared", [False, True], ids=["alone", "shared"])
async def test_a_damaged_record_of_any_kind_ends_no_gateway(bucket: str, is_shared: bool) -> None:
    fleet = Fleet(is_shared=is_shared)
    for key in ("0000", "w-diffusion", "zzzz"):
        await fleet.store.create(bucket, key, b'{"version":2,"value":{"nonsense":1}}')
    async with fleet.running():
        worker = fleet.worker(DIFFUSION)
        await worker.come()
        job = await fleet.gateway.jobs.create(generation())
        assert await worker.work() == 1
        assert (await fleet.get(job)).state is JobState.SUCCEEDED
        await fleet.store.create(bucket, "0001", b"garbage")
        await fleet.gateway.sweep()
        assert len((await fleet.gateway.jobs.list(page_size=10, page_token="")).jobs) == 1
        assert await fleet.gateway.dead_letters.page(limit=9) == []
        assert [each.worker.id for each in fleet.gateway.workers.statuses()] == ["w-diffusion"]
