"""Workers that vanish, fail, come late and forget, over two gateways and one store: everything ends, once."""

import asyncio
import random

import pytest

from fanlight.errors import LeaseLost
from services.gateway.app.leasing import LeasedTask
from services.gateway.domain.job import DIFFUSION, PREPROCESS, JobState
from tests.fakes.fleet import Fleet, FleetWorker, control, generation

JOBS = 12
IMAGES = 4


async def live(worker: FleetWorker, chance: random.Random, done: list[str]) -> None:
    """Lease now and then, and end each task in some way, or not at all."""
    for task in await worker.lease(limit=chance.randint(0, 4)):
        how = chance.choice(["complete", "complete", "complete", "vanish", "back", "fail", "late"])
        if how == "vanish":
            worker.held.clear()
            return
        await end(worker, task, how, done)


async def end(worker: FleetWorker, task: LeasedTask, how: str, done: list[str]) -> None:
    if how == "late":
        await worker.fleet.expire()
    try:
        if how == "back":
            await worker.fleet.gateway.queue.give_back(task.token)
            worker.held.remove(task.token)
        elif how == "fail" and task.task.attempts == ():
            await worker.fail(task)
        else:
            await worker.complete(task)
            done.append(f"{task.job.name}/{task.task.number}")
    except LeaseLost:
        worker.held.remove(task.token)


@pytest.mark.parametrize("seed", range(8))
async def test_every_job_ends_and_every_image_is_accepted_once(seed: int) -> None:
    chance = random.Random(seed)
    done: list[str] = []
    async with Fleet().running() as first, first.restarted().running() as second:
        gateways = [first, second]
        workers = [
            fleet.worker(stage, f"n{number}{i}")
            for number in range(3)
            for i, fleet in enumerate(gateways)
            for stage in (PREPROCESS, DIFFUSION)
        ]
        for worker in workers:
            await worker.come()
        jobs = [
            await chance.choice(gateways).gateway.jobs.create(generation(IMAGES, control(name=str(i))))
            for i in range(JOBS)
        ]
        for round_ in range(400):
            await asyncio.gather(*(live(worker, chance, done) for worker in chance.sample(workers, 4)))
            if round_ % 20 == 0:
                first.rest(30)
                second.rest(0)
            if round_ % 3 == 0:
                await chance.choice(gateways).expire()
        for _ in range(30):
            await first.expire()
            first.rest()
            second.rest()
            for worker in workers:
                worker.held.clear()
                while tasks := await worker.lease(limit=8):
                    for task in tasks:
                        await end(worker, task, "complete", done)
        ended = [await second.get(job) for job in jobs]
        assert {job.state for job in ended} <= {JobState.SUCCEEDED, JobState.FAILED}
        assert len(done) == len(set(done))
        succeeded = [job for job in ended if job.state is JobState.SUCCEEDED]
        assert succeeded
        assert all(len(job.tasks) == IMAGES + 1 for job in succeeded)
        assert all(len(task.outputs) == 1 for job in succeeded for task in job.tasks)
        assert first.gateway.queue.statistics() == second.gateway.queue.statistics() == []
