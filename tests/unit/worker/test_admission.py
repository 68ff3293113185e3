"""A stage's slots: none is lost, none is used twice, and callers are served in order."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanlight.errors import ResourceExhausted
from services.worker.admission import Admission, Slots

TURNS = 5


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


@dataclass
class Caller:
    """A caller that enters, and leaves on request."""

    admission: Admission
    count: int = 1
    inside: bool = False
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    def begin(self) -> "Caller":
        self.task = asyncio.create_task(self._call())
        return self

    async def _call(self) -> None:
        entering = self.admission.enter() if self.count == 1 else self.admission.enter_alone()
        async with entering:
            self.inside = True
            try:
                await self.leave.wait()
            finally:
                self.inside = False

    async def end(self) -> None:
        assert self.task is not None
        self.leave.set()
        with contextlib.suppress(asyncio.CancelledError, ResourceExhausted):
            await self.task


async def test_calls_run_up_to_the_slots_and_wait_in_order() -> None:
    admission = Admission(slots=2, waiting_limit=8)
    callers = [Caller(admission).begin() for _ in range(5)]
    await settle()
    assert [caller.inside for caller in callers] == [True, True, False, False, False]
    callers[1].leave.set()
    await settle()
    assert [caller.inside for caller in callers] == [True, False, True, False, False]
    for caller in callers:
        await caller.end()
    assert admission.free == 2


async def test_one_too_many_is_told_to_come_later() -> None:
    admission = Admission(slots=1, waiting_limit=0)
    async with admission.enter():
        with pytest.raises(ResourceExhausted) as raised:
            async with admission.enter():
                pass
    assert raised.value.retry_after_s
    async with admission.enter():
        assert admission.free == 0


async def test_a_call_cancelled_while_it_waits_leaves_the_queue() -> None:
    admission = Admission(slots=1, waiting_limit=8)
    first, second, third, fourth = (Caller(admission).begin() for _ in range(4))
    await settle()
    for cancelled in (fourth, second):
        assert cancelled.task is not None
        cancelled.task.cancel()
        await settle()
    assert admission.waiting == 1
    first.leave.set()
    await settle()
    assert third.inside
    await third.end()
    assert admission.free == 1


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_a_cancel_in_the_moment_of_its_turn_passes_the_slot_on(cancel_first: bool) -> None:
    admission = Admission(slots=1, waiting_limit=8)
    (held,) = admission.take(1)
    second, third = Caller(admission).begin(), Caller(admission).begin()
    await settle()
    assert second.task is not None
    steps = [second.task.cancel, held.release]
    for step in steps if cancel_first else reversed(steps):
        step()
    await settle()
    assert (second.inside, third.inside) == (False, True)
    await third.end()
    assert admission.free == 1


async def test_slots_released_twice_come_back_once() -> None:
    admission = Admission(slots=2, waiting_limit=8)
    one, _other = admission.take(2)
    one.release()
    one.release()
    assert admission.free == 1


async def test_nothing_is_taken_past_one_who_waits() -> None:
    admission = Admission(slots=2, waiting_limit=8)
    (held,) = admission.take(1)
    alone = Caller(admission, count=2).begin()
    await settle()
    assert admission.free == 0
    assert admission.take(1) == []
    held.release()
    await settle()
    assert alone.inside
    await alone.end()
    assert len(admission.take(5)) == 2


async def test_all_who_wait_for_a_free_slot_are_woken() -> None:
    admission = Admission(slots=1, waiting_limit=8)
    (held,) = admission.take(1)
    waiters = [asyncio.create_task(admission.wait_for_free()) for _ in range(3)]
    await settle()
    assert not any(waiter.done() for waiter in waiters)
    held.release()
    await asyncio.wait_for(asyncio.gather(*waiters), 5)


async def test_a_slot_that_goes_to_a_call_wakes_nobody_who_waits_for_a_free_one() -> None:
    admission = Admission(slots=1, waiting_limit=8)
    (held,) = admission.take(1)
    call, waiter = Caller(admission).begin(), asyncio.create_task(admission.wait_for_free())
    await settle()
    held.release()
    await settle()
    assert call.inside
    assert not waiter.done()
    await call.end()
    await asyncio.wait_for(waiter, 5)


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "alone", "leave", "cancel", "take", "release", "turn"]), st.integers(0, 7)),
    max_size=60,
)


class Crowd:
    """Callers and holders that do what the steps say, and what must hold at every moment."""

    def __init__(self, slots: int) -> None:
        self.admission = Admission(slots=slots, waiting_limit=4)
        self.callers: list[Caller] = []
        self.held: list[Slots] = []
        self.all: list[Caller] = []

    async def do(self, step: Step) -> None:
        what, index = step
        if what in ("enter", "alone"):
            caller = Caller(self.admission, count=1 if what == "enter" else self.admission.slots).begin()
            self.callers.append(caller)
            self.all.append(caller)
        elif what == "take":
            self.held += self.admission.take(index)
        elif what == "release" and self.held:
            self.held.pop(index % len(self.held)).release()
        elif what == "turn":
            await settle()
        elif self.callers:
            caller = self.callers.pop(index % len(self.callers))
            assert caller.task is not None
            caller.leave.set() if what == "leave" else caller.task.cancel()
        self.check()

    def check(self) -> None:
        used = sum(caller.count for caller in self.all if caller.inside) + len(self.held)
        assert used <= self.admission.slots
        assert 0 <= self.admission.free <= self.admission.slots - used

    async def go_home(self) -> None:
        for slot in self.held:
            slot.release()
        for caller in self.all:
            await asyncio.wait_for(caller.end(), 5)


@given(slots=st.integers(1, 4), steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_no_slot_is_ever_lost_or_used_twice(slots: int, steps: list[Step]) -> None:
    async def run() -> None:
        crowd = Crowd(slots)
        for step in steps:
            await crowd.do(step)
        await crowd.go_home()
        assert (crowd.admission.free, crowd.admission.waiting) == (slots, 0)

    asyncio.run(run())


@given(slots=st.integers(1, 3), cancelled=st.sets(st.integers(0, 7)), data=st.data())
@settings(max_examples=60, deadline=None)
def test_calls_that_are_not_cancelled_enter_in_the_order_they_came(
    slots: int, cancelled: set[int], data: st.DataObject
) -> None:
    entered: list[int] = []

    async def call(admission: Admission, number: int) -> None:
        async with admission.enter():
            entered.append(number)

    async def run() -> None:
        admission = Admission(slots=slots, waiting_limit=8)
        held = admission.take(slots)
        calls = [asyncio.create_task(call(admission, number)) for number in range(8)]
        await settle()
        for number in data.draw(st.permutations(sorted(cancelled))):
            calls[number].cancel()
        for slot in held:
            slot.release()
        await asyncio.gather(*calls, return_exceptions=True)
        assert admission.free == slots

    asyncio.run(run())
    assert entered == [number for number in range(8) if number not in cancelled]
