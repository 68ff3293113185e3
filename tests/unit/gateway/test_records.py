"""Records of another format version are refused when the gateway starts; damaged ones are skipped."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from fanlight.errors import FailedPrecondition
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.gateway import BUCKETS
from services.gateway.app.job_store import FORMAT_VERSION, JOBS, JOBS_BUCKET, OtherFormatVersion, UnreadableRecord
from services.gateway.domain import plan
from services.gateway.domain.job import DIFFUSION, JobState
from tests.fakes.fleet import Fleet, generation
from tests.fakes.jobs import generation_plan

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
