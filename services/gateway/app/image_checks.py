"""Checks of generated images: for a share of them a second node generates the same, and others make thumbnails of both.

Pixels of one seed are the same only nearly, and only on one kind of device: so only workers on equal devices are
compared, and by thumbnails. Who made an image makes no thumbnail of it, and nobody who generates sees the other image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fanlight.errors import FanlightError
from services.gateway.app.core import Core
from services.gateway.app.jobs import new_id
from services.gateway.app.result_checks import DEADLINE_S, DRAW_BYTES, DRAWS, OPEN_LIMIT, PRIORITY, Judge
from services.gateway.domain.job import (
    PREPROCESS,
    Claim,
    Input,
    Job,
    JobState,
    ResultCheck,
    StageRequest,
    Task,
    TaskState,
    task_name,
)
from services.gateway.domain.plan import in_pool
from services.gateway.domain.thumbnails import PNG_LIMIT_BYTES, distance, pixels_of
from services.kernel.blobs import BlobInfo
from services.kernel.logs import get_logger

log = get_logger()

# Two runs of one request on one kind of device differ by less than 1; images of other seeds or prompts by 30 and more.
DISTANCE_MAX = 8.0
# The field of a thumbnail's request that takes the image.
IMAGE = "image"
# The task that repeats the generation, and the one that makes the thumbnail of what it gives.
REPEATED, OWN_THUMBNAIL, FIRST_THUMBNAIL = 1, 2, 3


class ImageChecks:
    """Of generated images."""

    def __init__(self, core: Core, judge: Judge, thumbnail: StageRequest | None) -> None:
        """`thumbnail`: the request for one, without its image; None: nothing is checked."""
        self._job_store, self._workers, self._blobs = core.job_store, core.workers, core.blobs
        self._clock, self._random_bytes = core.clock, core.random_bytes
        self._share = core.settings.checked_images_share
        self._judge, self._thumbnail = judge, thumbnail
        # Ids of open checks, of every gateway.
        self._open: set[str] = set()
        core.job_store.observe(self._observe)

    def _observe(self, job: Job) -> None:
        if job.check is not None and not job.state.ended:
            self._open.add(job.id)
        else:
            self._open.discard(job.id)

    async def consider(self, job: Job, number: int) -> None:
        """Have a completed task's image checked, now and then. Never fails the task."""
        task = job.tasks[number - 1]
        if task.lease is None or len(self._open) >= OPEN_LIMIT or not self._is_drawn():
            return
        output = task.outputs[0].blob
        device = self._workers.device_of(task.lease.worker)
        claim = Claim(node=task.lease.node, worker=task.lease.worker, digest=output.digest, device=device)
        check = ResultCheck(task=task_name(job.id, number), claims=(claim,))
        repeated = replace(task, inputs=tuple(_fixed(job, each) for each in task.inputs))
        try:
            await self._ask(job, job.request_of(task), repeated, check, [output])
        except FanlightError as error:
            log.info("check_not_made", task=check.task, reason=error.reason)

    def _is_drawn(self) -> bool:
        return bool(self._share) and int.from_bytes(self._random_bytes(DRAW_BYTES)) < self._share * DRAWS

    async def _ask(
        self, job: Job, request: StageRequest, task: Task, check: ResultCheck, unseen: Sequence[BlobInfo]
    ) -> bool:
        """Create the check, unless no other node can do it. `unseen`: images of claims without a thumbnail."""
        first, nodes = check.claims[0], frozenset(each.node for each in check.claims)
        unlike = self._workers.nodes_beside(task.stage, first.device)
        if self._thumbnail is None or not first.device:
            return False
        # No node outside the job's pool sees its images.
        thumbnail = in_pool(self._thumbnail, job.pool)
        if not self._workers.offers.has_live(task.stage, request.facts.needs, but_not=nodes | unlike):
            return False
        if not self._workers.offers.has_live(PREPROCESS, thumbnail.facts.needs, but_not=nodes):
            return False
        now_s = self._clock.now_s()
        repeated = Task(
            number=REPEATED,
            stage=task.stage,
            request=0,
            state=TaskState.QUEUED,
            patch=task.patch,
            inputs=task.inputs,
            queue_time_s=now_s,
            other_nodes=nodes | unlike,
        )
        made = Job(
            id=new_id(now_s, self._random_bytes),
            state=JobState.QUEUED,
            create_time_s=now_s,
            priority=PRIORITY,
            request_id="",
            requests=(request, thumbnail),
            tasks=(repeated, *_thumbnails(unseen, nodes, now_s)),
            blobs=(*job.blobs, *unseen),
            tenant=job.tenant,
            deadline_s=now_s + DEADLINE_S,
            pool=job.pool,
            check=check,
        )
        await self._job_store.create(made)
        return True

    async def settle(self, job: Job) -> None:
        """Once the image and the thumbnails are there, compare; the check is gone afterwards."""
        check, repeated = job.check, job.tasks[REPEATED - 1]
        assert check is not None
        if any(task.state is not TaskState.SUCCEEDED for task in job.tasks):
            return
        if whole := await self._whole(job, check):

            async def ask(asked: ResultCheck) -> bool:
                return await self._ask(job, job.request, repeated, asked, ())

            await self._judge.judge(job, whole, _look_alike, ask)
        await self._job_store.forget(job.id)

    async def _whole(self, job: Job, check: ResultCheck) -> ResultCheck | None:
        """With the new claim, and a thumbnail of each; None where they prove nothing."""
        lease = job.tasks[REPEATED - 1].lease
        assert lease is not None
        device = self._workers.device_of(lease.worker)
        nodes = {each.node for each in check.claims} | {lease.node}
        thumbnails = [await self._read(job.tasks[number - 1], nodes) for number in range(2, len(job.tasks) + 1)]
        if device != check.claims[0].device or len(nodes) <= len(check.claims) or not all(thumbnails):
            log.info("check_proves_nothing", task=check.task, device=device)
            return None
        own = Claim(
            node=lease.node,
            worker=lease.worker,
            digest=job.tasks[REPEATED - 1].outputs[0].blob.digest,
            device=device,
            thumbnail=thumbnails[0],
        )
        seen = iter(thumbnails[1:])
        claims = tuple(each if each.thumbnail else replace(each, thumbnail=next(seen)) for each in check.claims)
        return replace(check, claims=(*claims, own))

    async def _read(self, task: Task, nodes: set[str]) -> str:
        """Pixels in hexadecimal; empty where one of the claiming nodes made it, or it is none."""
        assert task.lease is not None
        if task.lease.node in nodes:
            return ""
        blob = task.outputs[0].blob
        chunks = self._blobs.read(blob.scope, blob.digest, limit_bytes=PNG_LIMIT_BYTES)
        return (pixels_of(b"".join([chunk async for chunk in chunks])) or b"").hex()


def _thumbnails(unseen: Sequence[BlobInfo], nodes: frozenset[str], now_s: float) -> Iterator[Task]:
    own = Input(field=IMAGE, task=REPEATED)
    common = {"stage": PREPROCESS, "request": 1, "other_nodes": nodes}
    yield Task(number=OWN_THUMBNAIL, state=TaskState.BLOCKED, inputs=(own,), **common)  # type: ignore[arg-type]
    for number, blob in enumerate(unseen, FIRST_THUMBNAIL):
        given = (Input(field=IMAGE, blob=blob),)
        yield Task(number=number, state=TaskState.QUEUED, queue_time_s=now_s, inputs=given, **common)  # type: ignore[arg-type]


def _fixed(job: Job, given: Input) -> Input:
    """The image itself in place of the task that made it."""
    output = job.output_of(given.task) if given.task else None
    return replace(given, task=0, blob=output.blob) if output else given


def _look_alike(one: Claim, other: Claim) -> bool:
    if one.digest == other.digest:
        return True
    return distance(bytes.fromhex(one.thumbnail), bytes.fromhex(other.thumbnail)) <= DISTANCE_MAX
