"""A real gateway over stores in memory, a clock that only the test moves, and workers that do as they are told."""

import asyncio
import hashlib
import struct
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf import any_pb2

from fanlight.common.v1 import common_pb2
from fanlight.contract.names import digest_of
from fanlight.contract.needs import young_fields
from fanlight.contract.parameters import Parameter
from fanlight.contract.shipped import ShippedAnnotator
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.completion import ReportedOutput
from services.gateway.app.data_keys import DataKeys
from services.gateway.app.gateway import Gateway
from services.gateway.app.leasing import LeasedTask, Poll
from services.gateway.app.submission import KeptImage, NewJob, SourceImage
from services.gateway.config import GatewayLimits, GatewaySettings
from services.gateway.domain.fleet_catalog import FleetCatalog, catalog_of
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Failure, Fault, Job, Task
from services.gateway.domain.plan import JobPlan
from services.gateway.domain.workers import AnnouncedAnnotator, AnnouncedModel, Capabilities, LeftOutOfFleet, Worker
from services.gateway.scheduler.queue import Amounts, can_do, limit_of
from services.gateway.wire import requests, stages
from services.gateway.wire.thumbnails import thumbnail_request
from services.kernel.blobs import BlobInfo
from services.kernel.image_headers import ImageSize, size_in
from tests.fakes.broken_images import SIGNATURE, png_chunk
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.memory_store import MemoryStore

PNG = SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 192, 8, 2, 0, 0, 0))


# What a worker of today knows and an older one may not.
YOUNG = (
    *young_fields("fanlight.diffusion.v1.GenerateRequest"),
    *young_fields("fanlight.diffusion.v1.Control"),
)


def result(width_px: int, height_px: int, made_of: bytes) -> bytes:
    """An image of that size for header readers; others for other `made_of`."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"teXt", made_of), (b"IEND", b""))
    return SIGNATURE + b"".join(png_chunk(kind, data) for kind, data in chunks)


CRASH = Failure(reason="NODE_FAULT", message="out of memory")

CANNY = AnnouncedAnnotator(
    id="canny",
    parameters=(Parameter(name="low", default=100, minimum=0, maximum=255),),
    deterministic=True,
    controlnets=("canny",),
    version="1",
    device="cpu/uint8",
)
DREAM = AnnouncedAnnotator(id="dream", deterministic=False, controlnets=("canny",), version="1", device="cpu/uint8")
STARTER = AnnouncedModel(
    id="starter",
    kind="checkpoint",
    is_default=True,
    pipelines=("text2img", "controlnet"),
    width_px=256,
    height_px=256,
    size_step_px=8,
    family="starter",
    schedulers=("ddim", "euler"),
)
OTHER = AnnouncedModel(id="other", kind="checkpoint", family="sd1")
STARTER_CANNY = AnnouncedModel(id="canny", kind="controlnet", family="starter")
OFFERS = {
    PREPROCESS: Capabilities(annotators=(CANNY, DREAM)),
    DIFFUSION: Capabilities(models=(STARTER, OTHER, STARTER_CANNY), other_offers=tuple(sorted(YOUNG))),
}


class FakeClock:
    def __init__(self) -> None:
        self.time_s = 1_000_000.0
        self._jumped_s = 0.0

    def now_s(self) -> float:
        return self.time_s + self._jumped_s

    def monotonic_s(self) -> float:
        return self.time_s

    def advance(self, by_s: float) -> None:
        self.time_s += by_s

    def jump(self, by_s: float) -> None:
        """The wall clock only."""
        self._jumped_s += by_s


class CountingBytes:
    """Random bytes that are not: every call gives others, always in the same order; so does every gateway's."""

    def __init__(self, gateway: int) -> None:
        self._count = gateway * 1_000_000

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return hashlib.sha256(str(self._count).encode()).digest()[:size]


@dataclass
class Fleet:
    store: MemoryStore = field(default_factory=MemoryStore)
    blobs: MemoryBlobs = field(default_factory=MemoryBlobs)
    clock: FakeClock = field(default_factory=FakeClock)
    settings: dict[str, Any] = field(default_factory=dict)
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    is_shared: bool = False
    shipped: dict[str, ShippedAnnotator] = field(default_factory=dict)
    number: int = 0
    # Where the stores are sealed ones.
    data_keys: DataKeys | None = None
    gateway: Gateway = field(init=False)

    def __post_init__(self) -> None:
        self.gateway = Gateway(
            store=self.store,
            blobs=self.blobs,
            clock=self.clock,
            random_bytes=CountingBytes(self.number),
            # Annotators that the tests made up mean what their workers say.
            settings=GatewaySettings(**{"other_annotators": "*", "checked_share": 0.0, **self.settings}),
            limits=self.limits,
            is_shared=self.is_shared,
            shipped=self.shipped,
            data_keys=self.data_keys,
            thumbnail=thumbnail_request(),
        )

    @asynccontextmanager
    async def running(self):
        await self.gateway.load()
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(self.gateway.run())
            await self.gateway.wait_until_ready()
            yield self
            self.gateway.drain()

    def restarted(self) -> "Fleet":
        """Another gateway over the same stores, as after a kill."""
        return Fleet(
            store=self.store,
            blobs=self.blobs,
            clock=self.clock,
            settings=self.settings,
            limits=self.limits,
            is_shared=self.is_shared,
            shipped=self.shipped,
            number=self.number + 1,
            data_keys=self.data_keys,
        )

    def worker(
        self, stage: str, name: str = "w", *, node: str = "", is_old: bool = False, **offers: Any
    ) -> "FleetWorker":
        """`is_old`: it does not know the fields that are young today."""
        if stage == DIFFUSION and offers and not is_old:
            offers["other_offers"] = tuple(sorted({*offers.get("other_offers", ()), *YOUNG}))
        return FleetWorker(self, Worker(id=f"{name}-{stage}", node=node or name, stage=stage), offers)

    async def get(self, job: Job) -> Job:
        return await self.gateway.jobs.get(job.name)

    def rest(self, by_s: float = 600.0) -> None:
        """Let time pass in which no lease is looked at, so that pauses between tries end."""
        self.clock.advance(by_s)
        self.gateway._core.workers.retire_silent()
        self.gateway._core.queue_index.release_due()

    async def expire(self) -> None:
        """Let every lease that is not renewed run out."""
        self.clock.advance(self.gateway._leases.ttl_s)
        self.gateway._core.queue_index.release_due()
        await self.gateway.queue.expire_due()


class FleetWorker:
    def __init__(self, fleet: Fleet, worker: Worker, offers: dict[str, Any]) -> None:
        self.fleet = fleet
        self.worker = worker
        self.capabilities = Capabilities(**offers) if offers else OFFERS[worker.stage]
        self.held: list[str] = []
        # What it reports on its disk; None for all that it offers.
        self.disk: frozenset[str] | None = None

    def poll(self, *, limit: int = 1, wait_s: float = 0.0, held: Sequence[str] | None = None) -> Poll:
        offered = frozenset(model.id for model in self.capabilities.models)
        disk = self.worker.disk_models | (offered if self.disk is None else self.disk)
        return Poll(
            worker=replace(self.worker, disk_models=disk),
            capabilities_digest=hashlib.sha256(repr(self.capabilities).encode()).hexdigest(),
            capabilities=self.capabilities,
            max_tasks=limit,
            held_tokens=frozenset(self.held if held is None else held),
            wait_s=wait_s,
        )

    async def lease(self, **poll: Any) -> list[LeasedTask]:
        answer = await self.fleet.gateway.polls.lease(self.poll(**poll))
        self.held += [task.token for task in answer.tasks]
        return list(answer.tasks)

    async def come(self) -> None:
        """Say what it offers and take nothing."""
        await self.lease(limit=0)

    async def complete(self, task: LeasedTask, image: bytes = b"", scope: str = "") -> None:
        scope = scope or task.job.tenant
        width_px, height_px = size_in_request(stages.request_for(task.job, task.task))
        data = result(width_px, height_px, image or task.token.encode())
        await self.hand_in(task, data, (width_px, height_px), scope)

    async def hand_in(
        self, task: LeasedTask, data: bytes, size_px: tuple[int, int] = (64, 64), scope: str = ""
    ) -> None:
        """Any bytes as the result."""
        scope = scope or task.job.tenant
        written = await self.fleet.blobs.write(scope, _once(data))
        made = ReportedOutput(scope=scope, digest=written.digest, width_px=size_px[0], height_px=size_px[1])
        await self.fleet.gateway.queue.complete(task.token, [made], [])
        self.held.remove(task.token)

    async def fail(self, task: LeasedTask, fault: Fault = Fault.NODE, failure: Failure = CRASH) -> None:
        await self.fleet.gateway.queue.fail(task.token, fault, failure)
        self.held.remove(task.token)

    async def work(self) -> int:
        """Do everything there is; how many tasks that was."""
        done = 0
        while tasks := await self.lease(limit=8):
            for task in tasks:
                await self.complete(task)
                done += 1
        return done


async def _once(data: bytes):
    yield data


def size_in_request(message: any_pb2.Any) -> tuple[int, int]:
    """Of the task's image, in pixels; 64 x 64 where the request leaves it open."""
    asked = diffusion_pb2.GenerateRequest(), preprocessor_pb2.AnnotateRequest()
    sizes = [(each.width_px, each.height_px) for each in asked if message.Unpack(each) and each.width_px]
    return sizes[0] if sizes else (64, 64)


@dataclass(frozen=True)
class AbleFleet:
    """Workers that can do anything, for requests whose workers are not what a test is about."""

    models: tuple[AnnouncedModel, ...] = ()

    def catalog(self) -> FleetCatalog:
        return catalog_of(OFFERS, [*OFFERS.values(), Capabilities(models=self.models)])

    def can_any(self, stage: str, needs: frozenset[str], amounts: Any = (), *, only_live: bool = False) -> bool:
        return True

    def offering(self, stage: str, need: str) -> Sequence[str]:
        return ()

    def limits_of(self, stage: str, name: str, needs: frozenset[str] = frozenset()) -> Sequence[tuple[str, int | None]]:
        return ()


@dataclass(frozen=True)
class FixedFleet:
    """Workers that announced these, each on a node of its own: `node-0` and so on."""

    capabilities: Sequence[Capabilities]
    stages: Sequence[str] = (PREPROCESS, DIFFUSION)

    def catalog(self) -> FleetCatalog:
        return catalog_of(self.stages, self.capabilities)

    def can_any(self, stage: str, needs: frozenset[str], amounts: Amounts = (), *, only_live: bool = False) -> bool:
        return any(can_do(each.offers, each.all_limits, needs, amounts) for each in self.capabilities)

    def offering(self, stage: str, need: str) -> Sequence[str]:
        return [f"node-{i}" for i, each in enumerate(self.capabilities) if need in each.offers]

    def left_out(self) -> LeftOutOfFleet:
        found = [(each, (f"node-{i}",)) for i, own in enumerate(self.capabilities) for each in own.left_out]
        return LeftOutOfFleet(listed=tuple(found), count=len(found))

    def limits_of(self, stage: str, name: str, needs: frozenset[str] = frozenset()) -> Sequence[tuple[str, int | None]]:
        able = [
            (f"node-{i}", limit_of(each.all_limits, name))
            for i, each in enumerate(self.capabilities)
            if needs <= each.offers
        ]
        return sorted(able, key=lambda each: (each[1] is not None, -(each[1] or 0)))


def photo(name: str = "photo") -> common_pb2.ImageSource:
    return common_pb2.ImageSource(data=PNG + name.encode())


def control(annotator: str = "canny", name: str = "photo", **changes: Any) -> diffusion_pb2.Control:
    return diffusion_pb2.Control(image=photo(name), annotator=annotator, controlnet="canny", **changes)


def generation(count: int = 1, *controls: diffusion_pb2.Control, workers: Any = None, **changes: Any) -> NewJob:
    """Checked against these workers; where none are given, against some that can do anything."""
    job = {key: changes.pop(key) for key in ("request_id", "priority") if key in changes}
    values = {"model": "starter", "prompt": "a fox", **changes}
    request = diffusion_pb2.GenerateRequest(count=count, controls=controls, **values)
    known = workers or AbleFleet((replace(STARTER, id=request.model),))
    return requests.new_job(gateway_pb2.CreateJobRequest(generation=request, **job), known)


def annotation(name: str = "photo", annotator: str = "canny", *, side_px: int = 0, **given: Any) -> NewJob:
    request = preprocessor_pb2.AnnotateRequest(
        annotator=annotator, image=photo(name), width_px=side_px, height_px=side_px
    )
    request.parameters.update(given)
    return requests.new_job(gateway_pb2.CreateJobRequest(annotation=request), AbleFleet())


def kept(image: SourceImage) -> KeptImage:
    """The image as a blob; its bytes are kept nowhere. One that is named by its digest is 256 x 192 pixels."""
    digest = image.digest or digest_of(image.data)
    blob = BlobInfo(scope=image.scope, digest=digest, size_bytes=len(image.data), media_type="image/png")
    return KeptImage(blob=blob, size=size_in(image.data) or ImageSize(width_px=256, height_px=192))


def seed_of(task: Task) -> int:
    return diffusion_pb2.GenerateRequest.FromString(task.patch).seed


def resolved(new: NewJob) -> Any:
    """The stage's request with everything filled in that depends on the fleet."""
    return new.draft.draft.request


def plan_of(new: NewJob) -> JobPlan:
    return new.draft.plan({image.field: kept(image) for image in new.draft.images}, lambda: 7)
