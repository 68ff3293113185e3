"""The client for code without an event loop: the same calls, on a loop of its own."""

import asyncio
import signal
import threading

import pytest

from fanlight.client import AsyncClient, Client, generation
from fanlight.errors import CallFailed
from fanlight.gateway.v1.gateway_pb2 import Job
from tests.fakes.job_service import IMAGE_BYTES, FakeJobService, serving_beside


@pytest.fixture
def service():
    return FakeJobService()


@pytest.fixture
def address(service):
    with serving_beside(service) as address:
        yield address


def test_it_generates_and_reads_the_image(address):
    with Client(address) as client:
        job = client.generate("a cat")

        assert client.read_blob(job.images[0].blob) == IMAGE_BYTES


def test_a_watch_ends_with_the_job(address):
    with Client(address) as client:
        name = client.generate("a cat").name
        events = list(client.watch_job(name))

    assert events[-1].job.state == Job.STATE_SUCCEEDED


def test_a_watch_may_be_left_early(address, service):
    with Client(address) as client:
        name = client.create_job(generation("forever")).name
        for _ in client.watch_job(name):
            break

        assert client.get_job(name).state == Job.STATE_RUNNING


def test_errors_come_through(address):
    with Client(address) as client, pytest.raises(CallFailed, match="jobs/none"):
        client.get_job("jobs/none")


@pytest.fixture
def heeds_ctrl_c():
    """Whoever starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def once(call):
    """For the first event alone: a second Ctrl-C leaves without waiting for the job to be cancelled."""
    calls = iter([call])
    return lambda event: next(calls, lambda: None)()


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_cancels_the_job_that_is_waited_for(address, service):
    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with Client(address) as client, pytest.raises(KeyboardInterrupt):
        client.generate("forever", on_event=once(interrupt))

    assert service.jobs["jobs/j1"].state == Job.STATE_CANCELLED


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_that_does_not_wake_the_waiting_thread_cancels_the_job_too(address, service):
    """As one does that arrives just before the wait begins."""
    late = threading.Timer(30, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM))
    is_late = []
    before = signal.signal(signal.SIGTERM, lambda *_: is_late.append(True))
    late.start()

    with Client(address) as client, pytest.raises(KeyboardInterrupt):
        client.generate("forever", on_event=once(lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)))
    late.cancel()
    late.join()
    signal.signal(signal.SIGTERM, before)

    assert is_late == []
    assert service.jobs["jobs/j1"].state == Job.STATE_CANCELLED


def test_ctrl_c_while_the_work_is_being_started_cancels_the_job_too(address, service, monkeypatch):
    start, has_begun = asyncio.run_coroutine_threadsafe, threading.Event()

    def start_and_be_interrupted(work, loop):
        start(work, loop)
        assert has_begun.wait(30)
        raise KeyboardInterrupt

    with Client(address) as client:
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", start_and_be_interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.generate("forever", on_event=lambda event: has_begun.set())
        monkeypatch.undo()

    assert service.jobs["jobs/j1"].state == Job.STATE_CANCELLED


def test_closing_twice_does_nothing(address):
    client = Client(address)
    client.close()
    client.close()


def test_it_has_every_call_of_the_async_client():
    def calls(cls):
        return {name for name in vars(cls) if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)
