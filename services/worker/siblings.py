"""Further worker processes beside this one: as many as help on the machine, each a worker of its own. Knows no stage.

They are children of this process, are restarted with back-off, and stop when it does, however it ends.
"""

import asyncio
import contextlib
import os
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence

from fanlight.backoff import backoff_s
from fanlight.machine import Machine, this_machine
from fanlight.worker_plan import AUTO, ProcessCount, Warm, choose, environ_of_further
from services.kernel.logs import get_logger
from services.worker.start import private_bytes

log = get_logger()

RESTART_FIRST_S, RESTART_MAX_S = 1.0, 60.0
# One that lived so long was healthy: its next pause is the first one again.
HEALTHY_S = 60.0
# Beyond the grace period that it has by its settings.
KILL_AFTER_S = 10.0
# Settings of the first process that a further one must not have: the address of direct calls, and its children.
ANY_PORT = "127.0.0.1:0"


class Siblings:
    """Make one, and run it once this worker is warm."""

    def __init__(
        self,
        service: str,
        processes: str,
        *,
        grace_s: float,
        environ: Mapping[str, str] = os.environ,
        command: Sequence[str] = (),
        machine: Callable[[], Machine] = this_machine,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`processes`: how many there should be with this one, or `auto`."""
        self._service, self._processes = service, processes
        self._grace_s = grace_s
        self._environ = environ
        self._command = tuple(command) or (sys.executable, *sys.orig_argv[1:])
        self._machine, self._sleep, self._clock = machine, sleep, clock

    @property
    def needs_measurement(self) -> bool:
        return self._processes == AUTO

    async def run(self, stop: asyncio.Event, *, cores: float = 1.0, cards: int = 0) -> None:
        """Keep them until `stop` is set or this is cancelled, then until they ended: they drain beside this one.

        `cores`, `cards`: as of `Warm`.
        """
        machine = self._machine()
        warm = Warm(cores=cores, memory_bytes=private_bytes(), cards=cards)
        choice = choose(self._service, warm, machine)
        if not self.needs_measurement:
            choice = ProcessCount(int(self._processes), "as set")
        if choice.count > 1:
            log.info("worker_processes", count=choice.count, why=choice.reason, cores=machine.cores)
        further = [
            self._keep(number, environ_of_further(self._service, number, choice, warm, machine, self._environ))
            for number in range(2, choice.count + 1)
        ]
        keeping = [asyncio.create_task(each) for each in further]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({stopping, *keeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, *keeping):
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def _keep(self, number: int, own: Mapping[str, str]) -> None:
        deaths = 0
        while True:
            began_s = self._clock()
            code = await self._run_once(own)
            deaths = 0 if self._clock() - began_s >= HEALTHY_S else deaths
            pause_s = backoff_s(deaths, first_s=RESTART_FIRST_S, longest_s=RESTART_MAX_S, chance=1.0)
            deaths += 1
            log.warning("worker_process_ended", number=number, code=code, restart_s=pause_s)
            await self._sleep(pause_s)

    async def _run_once(self, own: Mapping[str, str]) -> int:
        """One process from start to end; its exit code. It ends with this process, by the pipe that it is given."""
        lifeline, held = os.pipe()
        try:
            environ = {
                **self._environ,
                **own,
                f"FANLIGHT_{self._service.upper()}_GRPC": ANY_PORT,
                "FANLIGHT_WORKER_PROCESSES": "1",
                "FANLIGHT_LIFELINE_FD": str(lifeline),
            }
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=DEVNULL, stdout=DEVNULL, env=environ, pass_fds=(lifeline,)
            )
            try:
                return await process.wait()
            finally:
                await self._stop(process)
        finally:
            os.close(lifeline)
            os.close(held)

    async def _stop(self, process: Process) -> None:
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._grace_s + KILL_AFTER_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
