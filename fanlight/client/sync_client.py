"""The async client for code without an event loop: the same calls, each run to its end on an event loop of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from fanlight.client.async_client import CANCEL_S, CONNECT_S, DEFAULT_ADDRESS, TIMEOUT_S, AsyncClient
from fanlight.gateway.v1.gateway_pb2 import JobEvent

# A signal that arrives just before a wait, or at another thread, does not end the wait: Python handles it afterwards.
SIGNAL_CHECK_S = 0.25

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def _blocking(
    method: Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Answer]],
) -> Callable[Concatenate["Client", Arguments], Answer]:
    @wraps(method)
    def call(self: "Client", *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        return self._run(method(self._client, *args, **kwargs))

    return call  # type: ignore[return-value]  # mypy keeps the name `self`


class Client:
    """Takes what AsyncClient takes; closed with `with` or `close`. Safe to use from several threads."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str = "",
        ca_file: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
        plain_text: bool = False,
        scope: str = "",
        timeout_s: float = TIMEOUT_S,
        connect_s: float = CONNECT_S,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fanlight-client", daemon=True)
        self._thread.start()

        async def build() -> AsyncClient:
            return AsyncClient(
                address,
                token=token,
                ca_file=ca_file,
                certificate=certificate,
                plain_text=plain_text,
                scope=scope,
                timeout_s=timeout_s,
                connect_s=connect_s,
            )

        self._client = self._run(build())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the loop too; a second call does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        ended = threading.Event()
        task: asyncio.Task[Answer] | None = None
        is_abandoned = False

        async def run() -> Answer:
            nonlocal task
            task = asyncio.current_task()
            try:
                if is_abandoned:
                    work.close()
                    raise asyncio.CancelledError
                return await work
            finally:
                ended.set()

        def abandon() -> None:
            nonlocal is_abandoned
            is_abandoned = True
            if task is not None:
                task.cancel()
            else:
                # Its first step, if it was started at all, comes before this.
                self._loop.call_soon(ended.set)

        # Ctrl-C may come from here on, because the work may run as soon as it is scheduled.
        try:
            return _result(asyncio.run_coroutine_threadsafe(run(), self._loop))
        except KeyboardInterrupt:
            # The call ends too, and has the time to cancel the job that it waits for.
            self._loop.call_soon_threadsafe(abandon)
            ended.wait(CANCEL_S)
            raise

    def watch_job(self, name: str, *, after_revision: int = 0) -> Iterator[JobEvent]:
        events = self._client.watch_job(name, after_revision=after_revision)

        async def next_event() -> JobEvent | None:
            return await anext(events, None)

        try:
            while (event := self._run(next_event())) is not None:
                yield event
        finally:
            self._run(events.aclose())

    generate = _blocking(AsyncClient.generate)
    annotate = _blocking(AsyncClient.annotate)
    create_job = _blocking(AsyncClient.create_job)
    wait_job = _blocking(AsyncClient.wait_job)
    get_job = _blocking(AsyncClient.get_job)
    list_jobs = _blocking(AsyncClient.list_jobs)
    cancel_job = _blocking(AsyncClient.cancel_job)
    delete_job = _blocking(AsyncClient.delete_job)
    explain_job = _blocking(AsyncClient.explain_job)
    get_webhook = _blocking(AsyncClient.get_webhook)
    list_dead_letters = _blocking(AsyncClient.list_dead_letters)
    get_dead_letter = _blocking(AsyncClient.get_dead_letter)
    redrive_dead_letter = _blocking(AsyncClient.redrive_dead_letter)
    list_damaged_records = _blocking(AsyncClient.list_damaged_records)
    get_damaged_record = _blocking(AsyncClient.get_damaged_record)
    remove_damaged_record = _blocking(AsyncClient.remove_damaged_record)
    list_annotators = _blocking(AsyncClient.list_annotators)
    list_models = _blocking(AsyncClient.list_models)
    list_left_out = _blocking(AsyncClient.list_left_out)
    list_workers = _blocking(AsyncClient.list_workers)
    write_blob = _blocking(AsyncClient.write_blob)
    read_blob = _blocking(AsyncClient.read_blob)
    delete_blob = _blocking(AsyncClient.delete_blob)


def _result(future: Future[Answer]) -> Answer:
    """The result or error. On the main thread no wait is longer than SIGNAL_CHECK_S, so that Ctrl-C ends it."""
    if threading.current_thread() is threading.main_thread():
        while not wait([future], SIGNAL_CHECK_S).done:
            pass
    return future.result()
