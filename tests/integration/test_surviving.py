"""Kill -9 on each process in the middle of a job: the job ends well after the restart, each image once."""

import os
import signal

import httpx
import psutil
import pytest

from tests.fakes.running import start_up, stop, until
from tests.integration.test_end_to_end import blob, create, finished, job, picture


@pytest.fixture(scope="module")
def mortal(tmp_path_factory, tiny_models):
    """One whose processes the tests kill."""
    started = start_up(tmp_path_factory.mktemp("mortal") / "data", tiny_models, FANLIGHT_GATEWAY_LEASE_TTL_S="3")
    yield started
    stop(started)


def working(http: str, name: str):
    """The job, once an image of it is being generated."""
    found = httpx.get(f"{http}/v1/{name}", timeout=60).raise_for_status().json()
    painting = any(task["stage"] == "diffusion" and task["state"] == "STATE_LEASED" for task in found["tasks"])
    return found if painting else None


@pytest.mark.parametrize("victim", ["diffusion", "gateway", "preprocessor"])
def test_a_job_survives_the_death_of(mortal, victim):
    source = blob(mortal.http, picture(seed=hash(victim) % 1000))
    name = create(mortal.http, job(f"survive {victim}", control=source, steps=80, count=4, seed=1))["name"]
    until(lambda: working(mortal.http, name))

    mortal.kill(victim)
    until(lambda: answers(mortal.http))
    done = finished(mortal.http, name)

    assert done["state"] == "STATE_SUCCEEDED", done
    assert [image["seed"] for image in done["images"]] == ["1", "2", "3", "4"]
    assert len({image["task"] for image in done["images"]}) == 4


def answers(http: str) -> bool:
    try:
        return httpx.get(f"{http}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_killing_up_itself_leaves_no_process_behind(tmp_path, tiny_models):
    started = start_up(tmp_path / "data", tiny_models)
    children = psutil.Process(started.process.pid).children(recursive=True)
    assert len(children) >= 3

    os.kill(started.process.pid, signal.SIGKILL)
    started.process.wait(10)

    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 60)


def test_what_was_accepted_is_still_there_after_everything_stopped(tmp_path, tiny_models):
    first = start_up(tmp_path / "data", tiny_models)
    name = create(first.http, job("later", steps=60, count=6))["name"]
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(10)

    second = until(lambda: _start_again(tmp_path, tiny_models), 120)
    try:
        assert finished(second.http, name)["state"] == "STATE_SUCCEEDED"
    finally:
        stop(second)


def _start_again(tmp_path, tiny_models):
    """The old gateway may hold the store for a moment longer."""
    try:
        return start_up(tmp_path / "data", tiny_models)
    except AssertionError:
        return None
