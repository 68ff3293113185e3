"""The services of one machine: started in order, kept alive, stopped in order."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from fanlight.cli.up import plan as plans
from fanlight.cli.up.child import Child
from fanlight.cli.up.datalock import locked
from fanlight.cli.up.logfile import LogFile
from fanlight.cli.up.plan import Addresses, Plan

Answer = TypeVar("Answer")
Body = Callable[[Addresses], Awaitable[Answer]]
# Entered with the addresses once the services say that they are ready; returns when they can be worked with.
Arrival = Callable[[Addresses], Awaitable[None]]

# A child that has not gone so long after its grace is killed.
KILL_AFTER_S = 10.0
TRIM_EVERY_S = 60.0


async def run_house(plan: Plan, arrival: Arrival, body: "Body[Answer]", *, hurry: asyncio.Event) -> Answer:
    """Runs the body with every service up, and stops them in whatever way it ends.

    ChildFailed where a service cannot be started. `hurry` cuts short what they are given to stop.
    """
    with locked(plan.data) as lock_fd, _lifeline() as lifeline_fd:
        house = House(plan, lock_fd=lock_fd, lifeline_fd=lifeline_fd, hurry=hurry)
        try:
            return await house.unless_one_fails(house.open(arrival, body))
        finally:
            await house.close()


@contextlib.contextmanager
def _lifeline() -> Iterator[int]:
    """The end of a pipe for children to read. It ends when this process does, however it dies: nobody else writes."""
    read_fd, write_fd = os.pipe()
    try:
        yield read_fd
    finally:
        os.close(read_fd)
        os.close(write_fd)


class House:
    def __init__(self, plan: Plan, *, lock_fd: int, lifeline_fd: int, hurry: asyncio.Event) -> None:
        self._plan = plan
        self._fds = (lock_fd, lifeline_fd)
        self._environ = plans.environ_of_all(lifeline_fd, os.environ)
        self._hurry = hurry
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gateway: list[asyncio.Task[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        self._attendants: list[asyncio.Task[None]] = []

    async def open(self, arrival: Arrival, body: "Body[Answer]") -> Answer:
        addresses = await self._start_gateway()
        stages = [
            self._child(name, plans.environ_of_stage(name, addresses), self._workers) for name in plans.STAGE_SERVICES
        ]
        for stage in stages:
            await stage.ready
        await arrival(addresses)
        return await body(addresses)

    async def _start_gateway(self) -> Addresses:
        asked = plans.environ_of_gateway(self._plan.data, self._plan.http, self._plan.grpc)
        gateway = self._child("gateway", asked, self._gateway)
        said = await gateway.ready
        addresses = Addresses(http=said["http"], grpc=said["grpc"])
        # Where it was found once it is found again.
        gateway.environ |= plans.environ_of_gateway(self._plan.data, addresses.http, addresses.grpc)
        return addresses

    def _child(self, name: str, environ: dict[str, str], tasks: list[asyncio.Task[None]]) -> Child:
        log = LogFile(self._plan.data / "logs" / f"{name}.log")
        child = Child(
            name,
            self._plan.command(name),
            environ=self._environ | environ,
            pass_fds=self._fds,
            log=log,
            grace_s=plans.grace_s(self._environ) + KILL_AFTER_S,
            tell=self._plan.tell,
            hurry=self._hurry,
        )
        self._begin(_trimming(log), self._attendants)
        if self._plan.follow is not None:
            self._begin(log.follow(_named(name, self._plan.follow)), self._attendants)
        self._begin(child.keep(), tasks)
        return child

    def _begin(self, work: Coroutine[Any, Any, None], tasks: list[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._note)
        tasks.append(task)

    def _note(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def unless_one_fails(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The work's own end, or the first failure of what is kept beside it."""
        task = asyncio.create_task(work)
        awaited: set[asyncio.Future[Any]] = {task, self._failed}
        try:
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                await self._failed
            return await task
        finally:
            await _stop([task])

    async def close(self) -> None:
        """Workers first: they hand back what they have not finished."""
        await _stop(self._workers)
        await _stop(self._gateway)
        await _stop(self._attendants)
        await _stop([self._failed])


async def _stop(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _trimming(log: LogFile) -> None:
    while True:
        await asyncio.sleep(TRIM_EVERY_S)
        await asyncio.to_thread(log.trim)


def _named(name: str, write: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: write(f"{name}: {line}")
