"""One picture that somebody waits for. For the event loop's thread."""

import asyncio
from collections.abc import Callable

from services.diffusion.engine.ports import Canvas, Finished, Painting, Progress, Report
from services.diffusion.generation import Generation


class Ticket:
    def __init__(self, generation: Generation, report: Report, clock: Callable[[], float]) -> None:
        self.generation = generation
        self.canvas: Canvas | None = None
        self.painting: asyncio.Future[Painting] = asyncio.get_running_loop().create_future()
        self._report = report
        self._clock = clock
        self._since_s = clock()
        self._spans: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        """Painted, failed, or nobody waits for it any more."""
        return self.painting.done()

    def passed(self, name: str) -> None:
        """The stretch of time up to now had this name."""
        now_s = self._clock()
        self._spans[name] = self._spans.get(name, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def tell(self, progress: Progress) -> None:
        if not self.is_over:
            self._report(progress)

    def leave(self) -> None:
        """Off the device: what only this picture kept in memory may go."""
        self.canvas = None

    def fail(self, error: BaseException) -> None:
        self.leave()
        if not self.is_over:
            self.painting.set_exception(error)

    def succeed(self, finished: Finished) -> None:
        self.leave()
        if not self.is_over:
            painting = Painting(
                pixels=finished.pixels,
                nsfw=finished.nsfw,
                device=finished.device,
                dtype=finished.dtype,
                spans=tuple(self._spans.items()),
            )
            self.painting.set_result(painting)
