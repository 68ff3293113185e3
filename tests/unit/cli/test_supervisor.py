"""Services as processes: started in order, restarted when they die, gone when everything ends, however it ends."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fanlight.cli.main import run
from fanlight.cli.service_plan import Addresses, DataInUse, ProcessPlan
from fanlight.cli.supervisor import ServiceFailed, run_services
from tests.fakes import up_process
from tests.fakes.running import until
from tests.fakes.up_process import at_once, command_of

LIMIT_S = 60


@pytest.fixture
def diary(tmp_path) -> Path:
    return tmp_path / "diary"


@pytest.fixture
def live(tmp_path, diary):
    """Runs a body beside services that keep a diary; `reports` has what the supervisor reported."""
    reports: list[str] = []

    async def run(body, **how):
        plan = ProcessPlan(
            data=tmp_path / "data",
            http="127.0.0.1:0",
            grpc="127.0.0.1:0",
            report=reports.append,
            command=command_of(diary, **how),
        )
        async with asyncio.timeout(LIMIT_S):
            return await run_services(plan, at_once, body, kill_now=asyncio.Event())

    run.reports = reports
    return run


def entries(diary: Path, what: str) -> list[list[str]]:
    """The diary's lines about that, as words."""
    lines = [line.split() for line in diary.read_text().splitlines()] if diary.exists() else []
    return [words for words in lines if words[1] == what]


def pid_of(diary: Path, service: str) -> int:
    """Of the latest process."""
    return int([words for words in entries(diary, "started") if words[0] == service][-1][2])


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


async def seen(condition) -> None:
    await asyncio.to_thread(until, condition, LIMIT_S)


async def test_a_body_gets_the_gateways_addresses_and_its_answer_comes_back(live):
    async def body(addresses):
        return addresses

    assert await live(body) == Addresses(http="127.0.0.1:4001", grpc="127.0.0.1:4002")


async def test_workers_stop_before_the_gateway_and_all_are_gone(live, diary):
    async def body(addresses):
        assert entries(diary, "started")[0][0] == "gateway"

    await live(body)

    assert {words[0] for words in entries(diary, "stopped")[:2]} == {"preprocessor", "diffusion"}
    assert entries(diary, "stopped")[2][0] == "gateway"
    assert all(gone(int(words[2])) for words in entries(diary, "started"))


async def test_the_bodys_own_error_comes_out_and_nothing_is_left(live, diary):
    async def body(addresses):
        raise LookupError("of the body")

    with pytest.raises(LookupError, match="of the body"):
        await live(body)

    assert len(entries(diary, "stopped")) == 3


async def test_a_gateway_that_died_comes_back_at_the_same_address(live, diary):
    async def body(addresses):
        os.kill(pid_of(diary, "gateway"), signal.SIGKILL)
        await seen(lambda: len(entries(diary, "started")) == 4)

    await live(body)

    assert [words[3] for words in entries(diary, "started") if words[0] == "gateway"] == [
        "127.0.0.1:0",
        "127.0.0.1:4002",
    ]
    assert live.reports[0].startswith("gateway was ended by SIGKILL; restarting it in 1 s")


async def test_a_service_with_a_wrong_setting_stops_everything_with_its_own_error(live, diary):
    async def body(addresses):
        raise AssertionError("must not be reached")

    with pytest.raises(ServiceFailed, match=r"^diffusion: the port is taken$"):
        await live(body, diffusion="wrong")

    assert {words[0] for words in entries(diary, "stopped")} <= {"preprocessor", "gateway"}
    assert all(gone(int(words[2])) for words in entries(diary, "started"))


async def test_a_second_up_in_the_same_folder_is_refused(live):
    async def body(addresses):
        with pytest.raises(DataInUse, match="in use by another `fanlight up`"):
            await live(body)
        return "went on"

    assert await live(body) == "went on"


async def test_each_service_logs_to_its_file(live, tmp_path):
    async def body(addresses):
        log = tmp_path / "data" / "logs" / "diffusion.log"
        await seen(lambda: log.exists() and "diffusion speaks" in log.read_text())

    await live(body)


@pytest.fixture
def up(tmp_path, diary):
    """A `fanlight up` in a process of its own, ready."""
    process = subprocess.Popen(
        [sys.executable, up_process.__file__, str(tmp_path / "data"), str(diary)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready http=127.0.0.1:4001 grpc=127.0.0.1:4002\n"
    yield process
    process.kill()
    process.communicate()
    for words in entries(diary, "started"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(words[2]), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_all_in_order(up, diary, number):
    up.send_signal(number)

    assert up.wait(LIMIT_S) == 0
    assert [words[0] for words in entries(diary, "stopped")][2] == "gateway"
    assert up.stderr.read() == "stopping once the running work has ended; a second signal stops it at once\n"


def test_killing_up_itself_leaves_no_process_behind(up, diary):
    pids = [int(words[2]) for words in entries(diary, "started")]
    assert len(pids) == 3

    up.kill()
    up.wait(LIMIT_S)

    until(lambda: all(gone(pid) for pid in pids), LIMIT_S)


def test_another_up_waits_for_the_children_of_a_killed_one(up, diary, tmp_path):
    up.kill()
    up.wait(LIMIT_S)

    async def body(addresses):
        return [gone(int(words[2])) for words in entries(diary, "started")[:3]]

    plan = ProcessPlan(data=tmp_path / "data", http="", grpc="", report=print, command=command_of(diary))
    assert asyncio.run(run_services(plan, at_once, body, kill_now=asyncio.Event())) == [True] * 3


def test_a_port_in_use_is_reported_with_the_options_that_change_it(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code = run(["up", "--data", str(tmp_path), "--http", "127.0.0.1:0", "--grpc", address])

    assert code == 1
    assert f"cannot listen on {address}" in (text := capsys.readouterr().err)
    assert text.endswith("; name another with --http or --grpc\n")
