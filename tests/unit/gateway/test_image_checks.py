"""A second node generates a share of the images again; others make thumbnails of both, which are compared."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.leasing import LeasedTask
from services.gateway.app.result_checks import PRIORITY
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Job
from services.gateway.domain.nodes import Grant
from services.gateway.domain.workers import AnnouncedAnnotator
from services.gateway.wire import stages
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import annotate
from services.preprocessor.registry import core
from services.preprocessor.wire import parse_request
from tests.fakes.fleet import Fleet, FleetWorker, control, generation
from tests.fakes.synthetic_images import encoded, scene

SIDE_PX = 64
RESIZES = AnnouncedAnnotator(id="ip2p", deterministic=True, version="1", device="cpu")
GPU = "cuda"


def image(seed: int = 0, *, noise: int = 0) -> bytes:
    """A scene, and how far each pixel is from the seed's own scene at most, as on another run."""
    pixels = np.roll(scene(SIDE_PX, SIDE_PX), 23 * seed, axis=(0, 1)).astype(int) ^ (255 if seed % 2 else 0)
    noisy = pixels + np.random.default_rng(noise).integers(-noise, noise + 1, pixels.shape)
    return encoded(np.clip(noisy, 0, 255).astype(np.uint8))


HONEST, HONEST_TOO, FALSE = image(), image(noise=2), image(1)


async def thumbnail(fleet: Fleet, task: LeasedTask) -> bytes:
    """As the real annotator makes it."""
    request = preprocessor_pb2.AnnotateRequest()
    stages.request_for(task.job, task.task).Unpack(request)
    blob = request.image.blob
    data = b"".join([chunk async for chunk in fleet.blobs.read(blob.scope, blob.digest)])
    request.image.CopyFrom(common_pb2.ImageSource(data=data))
    return annotate(parse_request(request, core(), ImageLimits()), limits=ImageLimits()).data


@dataclass
class Town:
    fleet: Fleet
    # They generate.
    painters: Sequence[FleetWorker]
    # It makes thumbnails.
    other: FleetWorker

    async def generate(self, *images: bytes) -> Job:
        """A job, done by the first painter with the first image; the others repeat it with theirs."""
        job = await self.fleet.gateway.jobs.create(generation(width_px=SIDE_PX, height_px=SIDE_PX))
        for painter, made in zip(self.painters, images, strict=False):
            (task,) = await painter.lease()
            await painter.hand_in(task, made)
            await self.look()
        return job

    async def look(self) -> None:
        while tasks := await self.other.lease():
            await self.other.hand_in(tasks[0], await thumbnail(self.fleet, tasks[0]), (16, 16))

    @property
    def checks(self) -> list[Job]:
        return [job for job in self.fleet.gateway._core.job_store.open_jobs if job.check is not None]

    @property
    def liars(self) -> list[bool]:
        workers = self.fleet.gateway.workers
        return [bool(workers.avoidances_of(each.worker.id)) for each in self.painters]


async def a_town(fleet: Fleet, *names: str, device: str = GPU) -> Town:
    painters = [fleet.worker(DIFFUSION, name) for name in names]
    for each in painters:
        each.worker = replace(each.worker, device=device)
    other = fleet.worker(PREPROCESS, "other", annotators=(RESIZES,))
    for each in (*painters, other):
        await each.come()
    return Town(fleet, painters, other)


@pytest.fixture
async def checked() -> AsyncIterator[Fleet]:
    async with Fleet(settings={"checked_images_share": 1.0}).running() as fleet:
        yield fleet


async def test_a_second_node_that_sees_nothing_of_the_first_image_generates_the_same(checked: Fleet) -> None:
    town = await a_town(checked, "a", "b")
    job = await town.generate(HONEST)
    assert (await checked.get(job)).state.ended, "the client waits for no check"
    (check,) = town.checks
    assert check.priority == PRIORITY
    assert await town.painters[0].lease() == [], "not the node that made it"
    (again,) = await town.painters[1].lease()
    original = (await checked.get(job)).tasks[0]
    assert stages.request_for(again.job, again.task) == stages.request_for(job, original)
    assert original.outputs[0].blob.digest not in str(stages.request_for(again.job, again.task))
    await town.painters[1].hand_in(again, HONEST_TOO)
    await town.look()
    assert town.checks == []
    assert town.liars == [False, False]
    assert await checked.store.get("jobs", check.id) is None


@pytest.mark.parametrize(
    ("images", "liars"),
    [
        ((FALSE, HONEST, HONEST_TOO), [True, False, False]),
        ((HONEST, FALSE, HONEST_TOO), [False, True, False]),
        ((HONEST, FALSE, image(2)), [False, False, False]),
    ],
)
async def test_a_third_node_decides(checked: Fleet, images: tuple[bytes, ...], liars: list[bool]) -> None:
    town = await a_town(checked, "a", "b", "c")
    await town.generate(*images)
    assert town.checks == []
    assert town.liars == liars


async def test_a_liar_with_a_credential_is_revoked(checked: Fleet) -> None:
    nodes = checked.gateway.nodes
    invite, secret = await nodes.invite(Grant(), uses=3, ttl_s=600.0, comment="")
    ids = [(await nodes.join_with_code(invite.id, secret, name="n", stages=())).node.id for _ in range(3)]
    town = await a_town(checked, *ids)
    await town.generate(HONEST, FALSE, HONEST_TOO)
    assert [nodes.is_revoked(each) for each in ids] == [False, True, False]
    assert (nodes.get(ids[1]).false_results, nodes.get(ids[0]).checked_results) == (1, 1)


async def test_nodes_on_another_device_are_not_compared(checked: Fleet) -> None:
    town = await a_town(checked, "a")
    await a_town(checked, "b", device="cpu")
    await town.generate(HONEST)
    assert town.checks == []
    # One that changes its device while it works proves nothing.
    late = await a_town(checked, "c")
    await town.generate(HONEST)
    (task,) = await late.painters[0].lease()
    late.painters[0].worker = replace(late.painters[0].worker, device="cpu")
    await late.painters[0].come()
    await late.painters[0].hand_in(task, FALSE)
    await late.look()
    assert town.checks == []
    assert town.liars == late.liars == [False]


async def test_who_made_an_image_makes_no_thumbnail_of_it(checked: Fleet) -> None:
    town = await a_town(checked, "other")
    await a_town(checked, "b")
    await town.generate(HONEST)
    assert town.checks == [], "its own node is the only one that could"


async def test_what_is_no_thumbnail_proves_nothing(checked: Fleet) -> None:
    town = await a_town(checked, "a", "b")
    await town.generate(HONEST)
    (task,) = await town.painters[1].lease()
    await town.painters[1].hand_in(task, FALSE)
    (look,) = await town.other.lease()
    await town.other.complete(look, b"an image without pixels")
    assert town.checks == []
    assert town.liars == [False, False]


async def test_a_control_image_that_another_task_made_comes_along(checked: Fleet) -> None:
    town = await a_town(checked, "a", "b")
    annotator = checked.worker(PREPROCESS, "canny")
    await annotator.come()
    await checked.gateway.jobs.create(generation(1, control(), width_px=SIDE_PX, height_px=SIDE_PX))
    (drawn,) = await annotator.lease()
    await annotator.hand_in(drawn, image(3))
    (task,) = await town.painters[0].lease()
    await town.painters[0].hand_in(task, HONEST)
    (again,) = await town.painters[1].lease()
    assert stages.request_for(again.job, again.task) == stages.request_for(task.job, task.task)


async def test_no_node_outside_the_jobs_pool_sees_its_image(checked: Fleet) -> None:
    trusted = ("pool:trusted",)
    town = await a_town(checked, "a", "b")
    for painter in town.painters:
        painter.capabilities = replace(painter.capabilities, other_offers=trusted)
        await painter.come()
    job = await checked.gateway.jobs.create(replace(generation(width_px=SIDE_PX, height_px=SIDE_PX), pool="trusted"))
    (task,) = await town.painters[0].lease()
    await town.painters[0].hand_in(task, HONEST)
    assert (await checked.get(job)).state.ended
    assert town.checks == []
    town.other.capabilities = replace(town.other.capabilities, other_offers=trusted)
    await town.other.come()
    await checked.gateway.jobs.create(replace(generation(width_px=SIDE_PX, height_px=SIDE_PX), pool="trusted"))
    (task,) = await town.painters[0].lease()
    await town.painters[0].hand_in(task, HONEST)
    (check,) = town.checks
    assert {"pool:trusted"} <= check.requests[0].facts.needs & check.requests[1].facts.needs


async def test_without_a_share_no_image_is_checked(fleet: Fleet) -> None:
    town = await a_town(fleet, "a", "b")
    await town.generate(HONEST)
    assert town.checks == []
