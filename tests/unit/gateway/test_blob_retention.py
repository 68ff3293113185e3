"""Which blobs of jobs are evicted, and when."""

import dataclasses
from pathlib import Path

from services.gateway.app.quotas import Quotas
from services.gateway.app.records import Records
from services.gateway.app.retention import GRACE_S, BlobRetention
from services.gateway.config import GatewaySettings
from services.gateway.domain.job import ControlImage, Job, Output, Task, TaskState, blobs_of
from services.kernel.blobs import BlobInfo
from tests.fakes.audit import audit_log
from tests.fakes.gateway import a_job
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.memory_store import MemoryStore

RETENTION_S = 1_000.0


class Clock:
    def __init__(self) -> None:
        self.s = 5_000.0

    def now_s(self) -> float:
        return self.s

    def monotonic_s(self) -> float:
        return self.s


@dataclasses.dataclass
class OpenJobs:
    open_jobs: list[Job]


def a_job_that_read(image: BlobInfo, *made: BlobInfo) -> Job:
    outputs = tuple(Output(blob=blob, width_px=1, height_px=1) for blob in made)
    task = Task(number=1, stage="preprocess", request=0, state=TaskState.LEASED, outputs=outputs)
    images = tuple(ControlImage(blob=blob, annotator="canny") for blob in made)
    return dataclasses.replace(a_job("1"), blobs=(image,), tasks=(task,), control_images=images)


def quotas_of(settings: GatewaySettings) -> Quotas:
    store = Records(MemoryStore(), Clock())
    return Quotas(store, Clock(), settings, audit_log(store, Clock()))


async def test_blobs_of_open_jobs_stay_and_others_go_after_the_jobs_retention(tmp_path: Path) -> None:
    clock = Clock()
    blobs = MemoryBlobs(now_s=clock.now_s)
    read, made, other = blobs.put(b"read"), blobs.put(b"made"), blobs.put(b"other")
    jobs = OpenJobs([a_job_that_read(read, made)])
    settings = GatewaySettings(data_dir=tmp_path, job_retention_s=RETENTION_S)
    retention = BlobRetention(jobs, blobs, clock, settings, quotas_of(settings))

    clock.s += RETENTION_S + GRACE_S
    await retention.sweep()
    assert blobs.used_bytes == len(b"readmadeother")

    clock.s += 1.0
    await retention.sweep()
    assert await blobs.stat("default", other.digest) is None
    assert blobs.used_bytes == len(b"readmade")

    jobs.open_jobs.clear()
    clock.s += 1.0
    await retention.sweep()
    assert blobs.used_bytes == len(b"readmade"), "they were needed a second ago"


def test_a_job_needs_what_its_tasks_read_and_made() -> None:
    blobs = MemoryBlobs()
    read, made = blobs.put(b"read"), blobs.put(b"made")
    assert set(blobs_of(a_job_that_read(read, made))) == {read, made}
