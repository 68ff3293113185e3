"""Paints all that is asked for, in batches that pictures join and leave between evaluations. Knows no torch."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from fanlight.contract.sizes import size_class
from fanlight.errors import ResourceExhausted
from services.diffusion.engine.keys import key_of
from services.diffusion.engine.ports import DeviceLost, Painting, Report, Studio
from services.diffusion.engine.step_times import StepTimes
from services.diffusion.engine.thread import DeviceThread
from services.diffusion.engine.ticket import Ticket
from services.diffusion.engine.turns import Turns
from services.diffusion.generation import Generation
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry

Result = TypeVar("Result")


class Engine:
    """`paint` from any task of the event loop that `run` runs in."""

    def __init__(
        self,
        open_studio: Callable[[], Studio],
        *,
        thread: DeviceThread,
        rows_limit: int,
        hold_limit_s: float,
        clock: Callable[[], float],
        family_of: Callable[[CheckpointEntry], str] = lambda entry: entry.base,
    ) -> None:
        """`open_studio` is called on the device thread, at the latest for the first model; `clock` counts seconds.

        `family_of`: as step times call a checkpoint's family.
        """
        self._open_studio = open_studio
        self._opened: Studio | None = None
        self._thread = thread
        self._clock = clock
        self._turns: Turns[Ticket] = Turns(rows_limit=rows_limit, hold_limit_s=hold_limit_s)
        # All that somebody waits for, on the device or not.
        self._tickets: set[Ticket] = set()
        self._arrived = asyncio.Event()
        self._numbers = itertools.count()
        self._family_of = family_of
        self.step_times = StepTimes()

    async def paint(self, generation: Generation, report: Report) -> Painting:
        """The finished picture. Cancelling the call takes it off the device before the next evaluation."""
        ticket = Ticket(generation, report, self._clock)
        self._tickets.add(ticket)
        self._turns.add(key_of(generation, number=next(self._numbers)), ticket)
        self._arrived.set()
        try:
            return await ticket.painting
        finally:
            self._turns.remove(ticket)
            self._tickets.discard(ticket)

    async def open(self) -> None:
        """Import and open what works on the device, before there is any work for it."""
        (await self._thread.attempt(self._studio)).result()

    async def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry] = ()) -> None:
        """Bring models into memory before anybody asks for them. Raises as the studio does."""
        (await self._thread.attempt(lambda: self._studio().load(checkpoint, controlnets))).result()

    async def run(self) -> None:
        """Paint until cancelled. DeviceLost, which all who wait get too: this process cannot paint any more."""
        try:
            await self._paint_on()
        except DeviceLost as error:
            for ticket in self._tickets:
                ticket.fail(error)
            raise

    async def _paint_on(self) -> None:
        batch: list[Ticket] = []
        while True:
            if not batch and not len(self._turns):
                self._arrived.clear()
                await self._arrived.wait()
            await self._join(batch)
            batch = _unfinished(batch)
            if batch:
                await self._advance(batch)
            batch = _unfinished(batch)

    async def _join(self, batch: list[Ticket]) -> None:
        """Whose turn it is join the batch; who finds no room beside it waits for its end."""
        taken = self._turns.take(now_s=self._clock(), running=len(batch))
        for number, ticket in enumerate(taken):
            try:
                await self._begin(ticket)
            except ResourceExhausted as error:
                if batch:
                    self._turns.put_back([each for each in taken[number:] if not each.is_over])
                    return
                ticket.fail(error)
            batch.append(ticket)

    async def _begin(self, ticket: Ticket) -> None:
        """ResourceExhausted where there is no room for it; other errors are the ticket's."""
        generation = ticket.generation
        ticket.passed("wait")
        controlnets = [control.controlnet for control in generation.controls]
        if await self._try(ticket, "load", lambda: self._studio().load(generation.checkpoint, controlnets), joins=True):
            begun = await self._try(ticket, "prepare", lambda: self._studio().begin(generation), joins=True)
            ticket.canvas = begun.result() if begun else None

    async def _advance(self, batch: Sequence[Ticket]) -> None:
        """One evaluation for all; an error of the whole batch is everybody's."""
        began_s = self._clock()
        done = await self._thread.attempt(lambda: self._studio().advance([ticket.canvas for ticket in batch]))
        if (error := done.exception()) is not None:
            if isinstance(error, DeviceLost):
                raise error
            for ticket in batch:
                ticket.fail(error)
            return
        self._measure(batch[0].generation, self._clock() - began_s)
        for ticket, advance in zip(batch, done.result(), strict=True):
            if advance.error is not None:
                ticket.fail(advance.error)
                continue
            ticket.tell(advance.progress)
            if advance.is_finished:
                await self._finish(ticket)

    async def _finish(self, ticket: Ticket) -> None:
        ticket.passed("denoise")
        if finished := await self._try(ticket, "decode", lambda: self._studio().finish(ticket.canvas)):
            ticket.succeed(finished.result())

    async def _try(
        self, ticket: Ticket, name: str, work: Callable[[], Result], *, joins: bool = False
    ) -> asyncio.Future[Result] | None:
        """Do one ticket's work on the device; None where it is over, by now or because of it. DeviceLost.

        `joins`: ResourceExhausted is raised, and the ticket goes on.
        """
        if ticket.is_over:
            return None
        done = await self._thread.attempt(work)
        ticket.passed(name)
        error = done.exception()
        if isinstance(error, DeviceLost) or (joins and isinstance(error, ResourceExhausted)):
            raise error
        if error is not None:
            ticket.fail(error)
            return None
        return done

    def _studio(self) -> Studio:
        """On the device thread only."""
        if self._opened is None:
            self._opened = self._open_studio()
        return self._opened

    def _measure(self, generation: Generation, took_s: float) -> None:
        """All of a batch have one checkpoint and size."""
        size = size_class(generation.width_px, generation.height_px)
        self.step_times.note(self._family_of(generation.checkpoint), size, took_s)


def _unfinished(batch: Sequence[Ticket]) -> list[Ticket]:
    for ticket in batch:
        if ticket.is_over:
            ticket.leave()
    return [ticket for ticket in batch if not ticket.is_over]
