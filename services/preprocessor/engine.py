"""Runs annotations on bounded, named threads, so that the event loop stays free."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from services.kernel.errors import Cancelled
from services.kernel.pictures import PictureLimits
from services.preprocessor.annotation import Annotation, ControlImage, annotate


class Engine:
    """As many threads as the stage has slots; whoever calls `run` holds a slot."""

    def __init__(self, *, threads: int, limits: PictureLimits) -> None:
        self._limits = limits
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="annotate")

    async def run(self, asked: Annotation) -> ControlImage:
        """Cancelling the call ends the work after its present step, and returns only then: the slot is still in use."""
        cancelled = threading.Event()

        def go_on() -> None:
            if cancelled.is_set():
                raise Cancelled("the call was cancelled")

        work = asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: annotate(asked, limits=self._limits, go_on=go_on)
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([work])
            raise

    def close(self) -> None:
        """Wait for what still runs."""
        self._executor.shutdown(cancel_futures=True)
