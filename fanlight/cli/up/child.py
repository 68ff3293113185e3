"""One service over all its processes: started, watched, started again, stopped. Knows not what it serves."""

import asyncio
import contextlib
import os
import re
import signal
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence

from fanlight.cli.up.logfile import LogFile
from fanlight.cli.up.restarts import Restarts
from fanlight.errors import FanlightError

# A service that is told a wrong setting ends with this code; to start it again would not help.
EXIT_SETTINGS = 2
# How often a service may die before it was ready for the first time.
FIRST_TRIES = 3
READY_LINE_LIMIT_BYTES = 64 * 1024
# How long the output of a process that died is read, where a child of its own holds it open.
LAST_WORDS_S = 1.0

_READY = re.compile(r"ready( \w+=\S+)*\s*")


class ChildFailed(FanlightError):
    """A service cannot be started here."""

    code = "FAILED_PRECONDITION"


class Child:
    """`keep` runs it. `environ` may be changed between starts; `pass_fds` stay open in the process."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        pass_fds: Sequence[int],
        log: LogFile,
        grace_s: float,
        tell: Callable[[str], None],
        hurry: asyncio.Event,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.environ = dict(environ)
        # What its first ready line said, such as {"grpc": "127.0.0.1:4711"}.
        self.ready: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self._command = tuple(command)
        self._pass_fds = tuple(pass_fds)
        self._log = log
        self._grace_s = grace_s
        self._tell = tell
        self._hurry = hurry
        self._clock = clock
        self._sleep = sleep
        self._restarts = Restarts()

    async def keep(self) -> None:
        """Until cancelled, and then until the process has gone. ChildFailed when it never gets ready."""
        while True:
            started_s, logged_bytes = self._clock(), self._log.size_bytes()
            code = await self._live()
            self._give_up_early(code, logged_bytes)
            delay_s = self._restarts.delay_s(self._clock() - started_s)
            self._tell(f"{self.name} {_ending(code)}; starting it again in {delay_s:g} s; its log: {self._log.path}")
            await self._sleep(delay_s)

    async def _live(self) -> int:
        """One process from start to end; its exit code."""
        with self._log.open() as log:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=log,
                env={**os.environ, **self.environ},
                pass_fds=self._pass_fds,
                # Ctrl-C at the terminal is for whoever started it, who then stops all in the right order.
                start_new_session=True,
                limit=READY_LINE_LIMIT_BYTES,
            )
        listening = asyncio.create_task(self._listen(process))
        try:
            code = await process.wait()
            # What it said last may still be in the pipe, and whether it was ready decides what its death means.
            await asyncio.wait({listening}, timeout=LAST_WORDS_S)
            return code
        finally:
            listening.cancel()
            await self._end(process)

    async def _listen(self, process: Process) -> None:
        """Takes the ready line, and whatever else it may print so that it never blocks."""
        assert process.stdout is not None
        while not process.stdout.at_eof():
            try:
                text = (await process.stdout.readline()).decode(errors="replace")
            except ValueError:
                # Longer than any ready line, and dropped.
                continue
            if _READY.fullmatch(text) and not self.ready.done():
                self.ready.set_result(dict(pair.split("=", 1) for pair in text.split()[1:]))

    async def _end(self, process: Process) -> None:
        """Ask it to stop, and make it when it does not within the grace, or when somebody is in a hurry."""
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        gone, hurried = asyncio.create_task(process.wait()), asyncio.create_task(self._hurry.wait())
        await asyncio.wait({gone, hurried}, timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await gone

    def _give_up_early(self, code: int, logged_bytes: int) -> None:
        """What was never ready and never will be is told, with its last words."""
        if self.ready.done() or (code != EXIT_SETTINGS and self._restarts.deaths + 1 < FIRST_TRIES):
            return
        words = self._log.last_line(since_bytes=logged_bytes).removeprefix("error: ")
        raise ChildFailed(f"{self.name}: {words or _ending(code)}" + _where(code, self._log))


def _where(code: int, log: LogFile) -> str:
    return "" if code == EXIT_SETTINGS else f" (its log: {log.path})"


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
