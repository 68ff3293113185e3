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
from fanlight.machine import Machine
from fanlight.worker_plan import parse_workers
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

    async def run(body, *, workers="", grpc="127.0.0.1:0", **how):
        plan = ProcessPlan(
            data=tmp_path / "data",
            http="127.0.0.1:0",
            grpc=grpc,
            report=reports.append,
            workers=parse_workers(workers),
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


def started(diary: Path, service: str) -> list[int]:
    return [int(words[2]) for words in entries(diary, "started") if words[0] == service]


@pytest.fixture
def three_cores(monkeypatch):
    here = Machine(cores=3.0, memory_bytes=10**10, available_bytes=10**10)
    monkeypatch.setattr("fanlight.cli.supervisor.this_machine", lambda: here)


async def test_once_the_first_worker_is_warm_as_many_more_start_as_help(live, diary, three_cores, tmp_path):
    async def body(addresses):
        await seen(lambda: len(started(diary, "diffusion")) == 3)

    await live(body, diffusion="warm")

    assert live.reports == ["diffusion: 3 workers (3 cores, 1 for each)"]
    assert len(started(diary, "preprocessor")) == 1
    assert [words[0] for words in entries(diary, "stopped")].index("gateway") == 4
    assert all(gone(pid) for pid in started(diary, "diffusion"))
    logs = sorted(each.name for each in (tmp_path / "data" / "logs").iterdir())
    assert logs == ["diffusion-2.log", "diffusion-3.log", "diffusion.log", "gateway.log", "preprocessor.log"]


async def test_a_given_number_of_workers_is_started_at_once_and_none_measures(live, diary, three_cores):
    async def body(addresses):
        await seen(lambda: len(started(diary, "diffusion")) == 2)

    await live(body, workers="diffusion=2", diffusion="warm")

    assert live.reports == []


async def test_a_further_worker_that_died_comes_back_alone(live, diary, three_cores):
    async def body(addresses):
        await seen(lambda: len(started(diary, "diffusion")) == 2)
        os.kill(started(diary, "diffusion")[1], signal.SIGKILL)
        await seen(lambda: len(started(diary, "diffusion")) == 3)

    await live(body, workers="diffusion=2")

    (report,) = live.reports
    assert "was ended by SIGKILL; restarting it in 1 s" in report
    assert len(entries(diary, "started")) == 5


async def test_a_further_worker_that_cannot_run_is_given_up_and_the_others_go_on(live, diary, three_cores):
    async def body(addresses):
        await seen(lambda: len(live.reports) == 3)
        return "went on"

    assert await live(body, diffusion="lonely") == "went on"

    assert sorted(live.reports[1:]) == [
        f"diffusion-{number} is given up: diffusion-{number}: the port is taken" for number in (2, 3)
    ]
    assert len(started(diary, "diffusion")) == 1


async def test_stages_start_with_a_gateway_whose_address_is_known(live, diary):
    """The gateway here never says that it is ready: nobody waits for that."""

    async def body(addresses):
        raise AssertionError("must not be reached")

    with socket.create_server(("127.0.0.1", 0)) as chosen:
        address = f"127.0.0.1:{chosen.getsockname()[1]}"
    running = asyncio.create_task(live(body, grpc=address, gateway="mute"))
    await seen(lambda: len(entries(diary, "started")) == 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(entries(diary, "stopped")) == 3


async def test_no_worker_starts_for_what_listens_already_at_the_gateways_address(live, diary):
    async def body(addresses):
        raise AssertionError("must not be reached")

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServiceFailed, match=r"^gateway: the port"):
        await live(body, grpc=f"127.0.0.1:{taken.getsockname()[1]}", gateway="wrong")

    assert entries(diary, "started") == []


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
