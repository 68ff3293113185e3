"""The previews of one direct call: at most one in so much time, the newest, and none after the image."""

import asyncio

from services.diffusion.service import PreviewStream
from services.worker.ports import MadePreview


class Call:
    """A call whose pauses and previews end when the test says."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.pauses: list[float] = []
        self.is_over = asyncio.Event()
        self.cpu_s = 0.0
        self.is_made = asyncio.Event()
        self.is_made.set()
        self.stream = PreviewStream(self._make, self._send, every_s=0.5, sleep=self._sleep)

    def _send(self, response) -> None:
        self.sent.append((response.preview.step, response.preview.image))

    async def _make(self, unmade) -> MadePreview:
        await self.is_made.wait()
        return MadePreview(data=unmade, cpu_s=self.cpu_s)

    async def _sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        await self.is_over.wait()
        self.is_over.clear()


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_first_is_sent_at_once_and_later_the_newest_of_those_that_were_due():
    call = Call()
    for step in range(1, 8):
        call.stream.put(step, b"%d" % step)
        await turns()
    call.is_over.set()
    await turns()
    assert call.sent == [(1, b"1"), (7, b"7")]
    assert call.pauses == [0.5, 0.5]
    await call.stream.end()


async def test_after_a_pause_without_previews_the_next_is_sent_at_once():
    call = Call()
    call.stream.put(1, b"1")
    await turns()
    call.is_over.set()
    await turns()
    call.stream.put(9, b"9")
    await turns()
    assert [step for step, _ in call.sent] == [1, 9]
    await call.stream.end()


async def test_the_one_that_is_being_made_at_the_end_is_sent_and_no_other():
    call = Call()
    call.is_made.clear()
    call.stream.put(1, b"1")
    await turns()
    call.stream.put(2, b"2")
    ending = asyncio.ensure_future(call.stream.end())
    await turns()
    assert not ending.done()
    call.is_made.set()
    await ending
    await turns()
    assert call.sent == [(1, b"1")]


async def test_after_one_that_took_long_the_pause_is_longer():
    call = Call()
    call.cpu_s = 2.0
    call.stream.put(1, b"1")
    await turns()
    assert call.pauses == [50.0]
    await call.stream.end()


async def test_a_preview_that_cannot_be_made_is_not_sent():
    call = Call()
    call.stream.put(1, b"")
    await turns()
    await call.stream.end()
    assert call.sent == []
