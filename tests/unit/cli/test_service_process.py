"""One service over all its processes; pauses take no time."""

import asyncio
import sys

import pytest

from fanlight.cli.service_plan import LogFile
from fanlight.cli.supervisor import ServiceFailed, ServiceProcess

READY = "print('ready grpc=127.0.0.1:1', flush=True);"
FOREVER = "import time; time.sleep(600)"


class Enough(Exception):
    pass


@pytest.fixture
def process(tmp_path):
    """Makes one from a script. Its pauses are recorded; after `pauses` of them it raises Enough."""

    def make(script: str, *, pauses: int = 0, grace_s: float = 30.0, kill_now: asyncio.Event | None = None):
        async def sleep(delay_s: float) -> None:
            slept_s.append(delay_s)
            if len(slept_s) == pauses:
                raise Enough

        slept_s: list[float] = []
        made = ServiceProcess(
            "diffusion",
            [sys.executable, "-SE", "-c", script],
            environ={},
            pass_fds=(),
            log=LogFile(tmp_path / "diffusion.log"),
            grace_s=grace_s,
            report=lambda text: None,
            kill_now=kill_now or asyncio.Event(),
            sleep=sleep,
        )
        made.slept_s = slept_s
        return made

    return make


async def test_the_pauses_grow_while_it_keeps_dying(process):
    dying = process(f"{READY} raise SystemExit(3)", pauses=6)

    with pytest.raises(Enough):
        await dying.keep()

    assert dying.slept_s == [1, 2, 4, 8, 16, 30]
    assert dying.ready.result() == {"grpc": "127.0.0.1:1"}


async def test_one_that_never_gets_ready_fails_with_its_last_log_line(process):
    broken = process("raise RuntimeError('broken to the core')")

    with pytest.raises(
        ServiceFailed, match=r"diffusion: RuntimeError: broken to the core \(its log: .*diffusion\.log\)"
    ):
        await broken.keep()

    assert broken.slept_s == [1, 2]


async def test_one_with_a_wrong_setting_is_not_restarted(process):
    wrong = process("import sys; sys.stderr.write('error: the port is taken\\n'); sys.exit(2)")

    with pytest.raises(ServiceFailed, match=r"^diffusion: the port is taken$"):
        await wrong.keep()

    assert wrong.slept_s == []


async def test_a_worker_that_the_gateway_refuses_is_not_restarted_though_it_was_ready(process):
    refused = process(f"{READY} import sys; sys.stderr.write('error: cannot join: wrong token\\n'); sys.exit(78)")

    with pytest.raises(ServiceFailed, match=r"^diffusion: cannot join: wrong token$"):
        await refused.keep()

    assert refused.slept_s == []


async def test_it_gets_only_what_it_inherits(process, monkeypatch, tmp_path):
    monkeypatch.setenv("FANLIGHT_CLIENT_TOKEN", "s3cret")
    script = "import os, sys; sys.exit(0 if 'FANLIGHT_CLIENT_TOKEN' in os.environ else 2)"
    poor = process(f"import sys; sys.stderr.write('error: none here\\n'); {script}")
    poor._inherits = lambda name: name != "FANLIGHT_CLIENT_TOKEN"

    with pytest.raises(ServiceFailed, match="none here"):
        await poor.keep()


async def test_code_2_after_it_was_ready_is_restarted_like_any_death(process):
    dying = process(f"{READY} raise SystemExit(2)", pauses=2)

    with pytest.raises(Enough):
        await dying.keep()


async def stopped(made: ServiceProcess) -> None:
    """Keep it until it is ready, then no longer."""
    keeping = asyncio.create_task(made.keep())
    await asyncio.wait_for(made.ready, 30)
    keeping.cancel()
    await asyncio.wait({keeping}, timeout=30)
    assert keeping.cancelled()


DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY} {FOREVER}"


async def test_one_that_ignores_sigterm_is_killed_after_its_grace_period(process):
    await stopped(process(DEAF, grace_s=0.05))


async def test_one_that_ignores_sigterm_is_killed_at_once_when_asked(process):
    kill_now = asyncio.Event()
    kill_now.set()

    await stopped(process(DEAF, grace_s=3600, kill_now=kill_now))


async def test_other_output_does_not_block_it(process):
    chatty = process(f"print('x' * 1_000_000); print('readynot'); {READY} {FOREVER}")

    await stopped(chatty)
