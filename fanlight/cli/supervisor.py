"""The services of one machine as processes: started in order, restarted with back-off when they die, stopped in order.

A stage has one process or several, each a worker of its own. Knows not what a service does, only the lines that it
prints when it is ready and warm, and the code that it exits with.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fanlight.backoff import backoff_s
from fanlight.cli import service_plan
from fanlight.cli.service_plan import Addresses, LogFile, ProcessPlan, locked
from fanlight.errors import FanlightError
from fanlight.machine import this_machine
from fanlight.worker_plan import ProcessCount, Warm, choose, environ_of_further, environ_of_one

Answer = TypeVar("Answer")
Body = Callable[[Addresses], Awaitable[Answer]]
# Called with the addresses once the services say that they are ready; returns when they can be given work.
WaitReady = Callable[[Addresses], Awaitable[None]]

# A process that has not exited so long after its grace period is killed.
KILL_AFTER_S = 10.0
TRIM_EVERY_S = 60.0

# A service whose settings are wrong exits with this code, and a worker that the gateway refuses because of its settings
# with the other one; restarting it would not help.
EXIT_SETTINGS = 2
EXIT_REFUSED = 78
# How often a service may die before it was ready for the first time.
FIRST_TRIES = 3
READY_LINE_LIMIT_BYTES = 64 * 1024
# How long the output of a dead process is read when a child of its own keeps the pipe open.
LAST_OUTPUT_S = 1.0

# How long stages that start with the gateway wait until it listens.
START_TOGETHER_S = 10.0

FIRST_RESTART_S, LONGEST_RESTART_S = 1.0, 30.0
# A process that lived this long was healthy: the back-off starts from the beginning.
HEALTHY_S = 60.0

_READY = re.compile(r"ready( \w+=\S+)*\s*")
_WARM = re.compile(r"warm( \w+=\S+)+\s*")


class ServiceFailed(FanlightError):
    """A service cannot be started here."""

    code = "FAILED_PRECONDITION"


class RestartBackoff:
    """The pauses before restarts: 1, 2, 4 ... 30 seconds. Pure."""

    def __init__(self) -> None:
        self.deaths = 0

    def delay_s(self, lived_s: float) -> float:
        """Counts a death; the pause before the next start."""
        if lived_s >= HEALTHY_S:
            self.deaths = 0
        delay_s = backoff_s(self.deaths, first_s=FIRST_RESTART_S, longest_s=LONGEST_RESTART_S, chance=1.0)
        self.deaths += 1
        return delay_s


class ServiceProcess:
    """One service over all its processes. `keep` runs it; `environ` may change between starts.

    `pass_fds` stay open in the process; `kill_now` cuts its grace period short.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        pass_fds: Sequence[int],
        log: LogFile,
        grace_s: float,
        report: Callable[[str], None],
        kill_now: asyncio.Event,
        inherits: Callable[[str], bool] = lambda name: True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.environ = dict(environ)
        # What its first ready line says, such as {"grpc": "127.0.0.1:4711"}.
        self.ready: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        # What it says once it is warm, where it measures that.
        self.warm: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self._command = tuple(command)
        self._pass_fds = tuple(pass_fds)
        # Which variables of this process's environment it gets.
        self._inherits = inherits
        self.log = log
        self._grace_s = grace_s
        self._report = report
        self._kill_now = kill_now
        self._clock = clock
        self._sleep = sleep
        self._backoff = RestartBackoff()

    async def keep(self) -> None:
        """Until cancelled, and then until the process has exited. ServiceFailed when it never gets ready."""
        while True:
            started_s, logged_bytes = self._clock(), self.log.size_bytes()
            code = await self._run_once()
            self._give_up_early(code, logged_bytes)
            delay_s = self._backoff.delay_s(self._clock() - started_s)
            self._report(f"{self.name} {_exit_text(code)}; restarting it in {delay_s:g} s; its log: {self.log.path}")
            await self._sleep(delay_s)

    async def _run_once(self) -> int:
        """One process from start to end; its exit code."""
        with self.log.open() as log:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=log,
                env={name: value for name, value in os.environ.items() if self._inherits(name)} | self.environ,
                pass_fds=self._pass_fds,
                # Ctrl-C at the terminal reaches only the supervisor, which stops all services in order.
                start_new_session=True,
                limit=READY_LINE_LIMIT_BYTES,
            )
        reading = asyncio.create_task(self._read_output(process))
        try:
            code = await process.wait()
            # Its last output may still be in the pipe, and whether it was ready decides what its death means.
            await asyncio.wait({reading}, timeout=LAST_OUTPUT_S)
            return code
        finally:
            reading.cancel()
            await self._stop(process)

    async def _read_output(self, process: Process) -> None:
        """Takes the ready line and the warm one, and drops whatever else it prints so that it never blocks."""
        assert process.stdout is not None
        while not process.stdout.at_eof():
            try:
                text = (await process.stdout.readline()).decode(errors="replace")
            except ValueError:
                # Longer than any ready line, and dropped.
                continue
            for form, told in ((_READY, self.ready), (_WARM, self.warm)):
                if form.fullmatch(text) and not told.done():
                    told.set_result(dict(pair.split("=", 1) for pair in text.split()[1:]))

    async def _stop(self, process: Process) -> None:
        """SIGTERM, then SIGKILL after the grace period or when `kill_now` is set."""
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        exited, killing = asyncio.create_task(process.wait()), asyncio.create_task(self._kill_now.wait())
        await asyncio.wait({exited, killing}, timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED)
        killing.cancel()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await exited

    def _give_up_early(self, code: int, logged_bytes: int) -> None:
        """ServiceFailed, with its last log line, for a service that never will be ready, or refused."""
        is_early = code == EXIT_SETTINGS or self._backoff.deaths + 1 >= FIRST_TRIES
        if code != EXIT_REFUSED and (self.ready.done() or not is_early):
            return
        line = self.log.last_line(since_bytes=logged_bytes).removeprefix("error: ")
        raise ServiceFailed(f"{self.name}: {line or _exit_text(code)}" + _log_hint(code, self.log))


def _log_hint(code: int, log: LogFile) -> str:
    return "" if code in (EXIT_SETTINGS, EXIT_REFUSED) else f" (its log: {log.path})"


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


async def run_services(
    plan: ProcessPlan, wait_ready: WaitReady, body: "Body[Answer]", *, kill_now: asyncio.Event
) -> Answer:
    """Runs the body while every service is up, and stops them whatever way it ends.

    ServiceFailed where a service cannot be started. `kill_now` cuts short the time that they are given to stop.
    """
    with locked(plan.data) as lock_fd, _lifeline() as lifeline_fd:
        supervisor = Supervisor(plan, lock_fd=lock_fd, lifeline_fd=lifeline_fd, kill_now=kill_now)
        try:
            return await supervisor.until_one_fails(supervisor.run(wait_ready, body))
        finally:
            await supervisor.close()


@contextlib.contextmanager
def _lifeline() -> Iterator[int]:
    """The read end of a pipe, for children. It ends when this process dies, however: no other has the write end."""
    read_fd, write_fd = os.pipe()
    try:
        yield read_fd
    finally:
        os.close(read_fd)
        os.close(write_fd)


class Supervisor:
    """Starts the gateway, then the stages; stops the stages, then the gateway."""

    def __init__(self, plan: ProcessPlan, *, lock_fd: int, lifeline_fd: int, kill_now: asyncio.Event) -> None:
        self._plan = plan
        self._fds = (lock_fd, lifeline_fd)
        self._environ = service_plan.environ_of_all(lifeline_fd, os.environ)
        self._kill_now = kill_now
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gateway: list[asyncio.Task[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        self._log_tasks: list[asyncio.Task[None]] = []

    async def run(self, wait_ready: WaitReady, body: "Body[Answer]") -> Answer:
        gateway = self._gateway_process()
        early = await asyncio.to_thread(service_plan.known_addresses, self._plan, os.environ)
        stages = self._start_stages(early, {"FANLIGHT_WORKER_GATEWAY_WAIT_S": f"{START_TOGETHER_S:g}"}) if early else []
        addresses = await self._addresses(gateway)
        if not stages:
            introduced = await self._plan.introduce(addresses) if self._plan.introduce else {}
            stages = self._start_stages(addresses, introduced)
        for stage in stages:
            await stage.ready
        await wait_ready(addresses)
        return await body(addresses)

    def _start_stages(self, addresses: Addresses, introduced: Mapping[str, str]) -> list[ServiceProcess]:
        """The first worker of each stage, which are returned; others beside them now, or once the first is warm."""
        firsts = []
        for service in service_plan.STAGE_SERVICES:
            environ = {**service_plan.environ_of_stage(service, addresses, os.environ), **introduced}
            count, is_auto = self._plan.workers.at_start(service), self._plan.workers.is_auto(service)
            own = environ_of_one(service, count, is_auto=is_auto, machine=this_machine(), environ=os.environ)
            first = self._process(service, environ | own, self._workers, inherits=_is_for_stages)
            firsts.append(first)
            for number in range(2, count + 1):
                self._begin(self._keep_further(service, number, environ | own), self._workers)
            if is_auto:
                self._begin(self._add_further(service, first, environ), self._workers)
        return firsts

    async def _add_further(self, service: str, first: ServiceProcess, environ: dict[str, str]) -> None:
        """Once the first worker of a stage is warm: as many more as help. They end with this task."""
        warm = Warm.parse(await first.warm)
        if warm is None:
            return
        machine = this_machine()
        choice = choose(service, warm, machine)
        self._plan.report(_chosen(service, choice))
        async with asyncio.TaskGroup() as group:
            for number in range(2, choice.count + 1):
                own = environ_of_further(service, number, choice, warm, machine, os.environ)
                group.create_task(self._keep_further(service, number, environ | own))

    async def _keep_further(self, service: str, number: int, environ: dict[str, str]) -> None:
        """One that cannot run is reported, and the others go on without it."""
        process = self._make_process(f"{service}-{number}", service, environ, inherits=_is_for_stages)
        self._follow(process)
        try:
            await process.keep()
        except ServiceFailed as error:
            self._plan.report(f"{process.name} is given up: {error.message}")

    def _gateway_process(self) -> ServiceProcess:
        environ = service_plan.environ_of_gateway(self._plan.data, self._plan.http, self._plan.grpc)
        return self._process("gateway", environ, self._gateway)

    async def _addresses(self, gateway: ServiceProcess) -> Addresses:
        ready = await gateway.ready
        ca_file = service_plan.ca_file_of(self._plan.data, self._plan.grpc, os.environ)
        addresses = Addresses(http=ready["http"], grpc=ready["grpc"], ca_file=ca_file)
        # A restarted gateway listens where it listened before.
        gateway.environ |= service_plan.environ_of_gateway(self._plan.data, addresses.http, addresses.grpc)
        return addresses

    def _process(
        self,
        service: str,
        environ: dict[str, str],
        tasks: list[asyncio.Task[None]],
        *,
        inherits: Callable[[str], bool] = lambda variable: True,
    ) -> ServiceProcess:
        """The only one of its service, or the first; where it fails, everything ends."""
        process = self._make_process(service, service, environ, inherits=inherits)
        self._follow(process)
        self._begin(process.keep(), tasks)
        return process

    def _make_process(
        self, name: str, service: str, environ: dict[str, str], *, inherits: Callable[[str], bool]
    ) -> ServiceProcess:
        return ServiceProcess(
            name,
            self._plan.command(service),
            environ=self._environ | environ,
            pass_fds=self._fds,
            log=LogFile(self._plan.data / "logs" / f"{name}.log"),
            grace_s=service_plan.grace_s(self._environ) + KILL_AFTER_S,
            report=self._plan.report,
            kill_now=self._kill_now,
            inherits=inherits,
        )

    def _follow(self, process: ServiceProcess) -> None:
        self._begin(_trimming(process.log), self._log_tasks)
        if self._plan.follow is not None:
            self._begin(process.log.follow(_named(process.name, self._plan.follow)), self._log_tasks)

    def _begin(self, work: Coroutine[Any, Any, None], tasks: list[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._note_failure)
        tasks.append(task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def until_one_fails(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The work's own end, or the first failure of a task that runs beside it."""
        task = asyncio.create_task(work)
        awaited: set[asyncio.Future[Any]] = {task, self._failed}
        try:
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                await self._failed
            return await task
        finally:
            await _cancel([task])

    async def close(self) -> None:
        """Workers first: they hand back what they have not finished."""
        await _cancel(self._workers)
        await _cancel(self._gateway)
        await _cancel(self._log_tasks)
        await _cancel([self._failed])


def _is_for_stages(variable: str) -> bool:
    return service_plan.is_for_stages(variable, os.environ)


def _chosen(service: str, choice: ProcessCount) -> str:
    return f"{service}: {choice.count} {'worker' if choice.count == 1 else 'workers'} ({choice.reason})"


async def _cancel(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _trimming(log: LogFile) -> None:
    while True:
        await asyncio.sleep(TRIM_EVERY_S)
        await asyncio.to_thread(log.trim)


def _named(name: str, write: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: write(f"{name}: {line}")
