"""One service over all its processes, with pauses that take no time."""

import asyncio
import sys

import pytest

from fanlight.cli.up.child import Child, ChildFailed
from fanlight.cli.up.logfile import LogFile

READY = "print('ready grpc=127.0.0.1:1', flush=True);"
FOREVER = "import time; time.sleep(600)"


class Enough(Exception):
    pass


@pytest.fixture
def child(tmp_path):
    """Made from a script; its pauses are noted, and after so many it is enough."""

    def make(script: str, *, pauses: int = 0, grace_s: float = 30.0, hurry: asyncio.Event | None = None):
        async def sleep(delay_s: float) -> None:
            slept_s.append(delay_s)
            if len(slept_s) == pauses:
                raise Enough

        slept_s: list[float] = []
        made = Child(
            "painter",
            [sys.executable, "-SE", "-c", script],
            environ={},
            pass_fds=(),
            log=LogFile(tmp_path / "painter.log"),
            grace_s=grace_s,
            tell=lambda text: None,
            hurry=hurry or asyncio.Event(),
            sleep=sleep,
        )
        made.slept_s = slept_s
        return made

    return make


async def test_one_that_dies_again_and_again_is_given_longer_and_longer_pauses(child):
    dying = child(f"{READY} raise SystemExit(3)", pauses=6)

    with pytest.raises(Enough):
        await dying.keep()

    assert dying.slept_s == [1, 2, 4, 8, 16, 30]
    assert dying.ready.result() == {"grpc": "127.0.0.1:1"}


async def test_one_that_never_gets_ready_is_given_up_with_its_last_words(child):
    broken = child("raise RuntimeError('broken to the core')")

    with pytest.raises(ChildFailed, match=r"painter: RuntimeError: broken to the core \(its log: .*painter\.log\)"):
        await broken.keep()

    assert broken.slept_s == [1, 2]


async def test_one_with_a_wrong_setting_is_not_tried_again(child):
    wrong = child("import sys; sys.stderr.write('error: the port is taken\\n'); sys.exit(2)")

    with pytest.raises(ChildFailed, match=r"^painter: the port is taken$"):
        await wrong.keep()

    assert wrong.slept_s == []


async def test_code_2_after_it_was_ready_once_is_a_death_like_any_other(child):
    dying = child(f"{READY} raise SystemExit(2)", pauses=2)

    with pytest.raises(Enough):
        await dying.keep()


async def stopped(made: Child) -> None:
    """Keep it until it is ready, then no longer."""
    keeping = asyncio.create_task(made.keep())
    await asyncio.wait_for(made.ready, 30)
    keeping.cancel()
    await asyncio.wait({keeping}, timeout=30)
    assert keeping.cancelled()


DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY} {FOREVER}"


async def test_one_that_takes_no_sigterm_is_killed_after_its_grace(child):
    await stopped(child(DEAF, grace_s=0.05))


async def test_one_that_takes_no_sigterm_is_killed_at_once_in_a_hurry(child):
    hurry = asyncio.Event()
    hurry.set()

    await stopped(child(DEAF, grace_s=3600, hurry=hurry))


async def test_what_it_prints_besides_does_not_block_it(child):
    chatty = child(f"print('x' * 1_000_000); print('readynot'); {READY} {FOREVER}")

    await stopped(chatty)
