"""The leases that a worker holds: when the next renewal is due, what is sent with it, and what the answer changes."""

import asyncio
import math

import pytest

from fanlight.errors import NodeFault
from fanlight.queue.v1 import queue_pb2
from services.worker.leases import WorkerLease, WorkerLeases
from services.worker.ports import MadePreview, Preview, StageProgress
from services.worker.previews import PreviewMaker, PreviewPace
from services.worker.retry import Env

Status = queue_pb2.RenewedLease


def held(*, now_s: float = 0.0) -> tuple[WorkerLeases, WorkerLease]:
    leases = WorkerLeases(progress_every_s=1.0)
    task = queue_pb2.LeasedTask(name="jobs/a/tasks/1", lease_token=b"token", ttl_s=30.0)
    return leases, leases.add(task, now_s=now_s)


def answer(status: "Status.Status.ValueType", ttl_s: float = 30.0) -> list[queue_pb2.RenewedLease]:
    return [queue_pb2.RenewedLease(lease_token=b"token", status=status, ttl_s=ttl_s)]


def test_nothing_is_due_while_nothing_is_held() -> None:
    leases, lease = held()
    leases.remove(lease)
    assert leases.due_s == math.inf


def test_a_lease_is_renewed_long_before_it_ends() -> None:
    leases, _ = held(now_s=100.0)
    assert leases.due_s == 110.0
    leases.take_renewals(now_s=110.0)
    leases.note(answer(Status.STATUS_RENEWED, ttl_s=60.0), now_s=110.0)
    assert leases.due_s == 130.0


def test_a_renewal_that_was_not_answered_stays_due() -> None:
    leases, _ = held()
    leases.take_renewals(now_s=12.0)
    assert leases.due_s == 10.0


def test_progress_goes_soon_but_not_at_once_after_the_last() -> None:
    leases, lease = held()
    leases.report(lease, StageProgress(step=1, steps=9))
    assert leases.due_s < 0
    leases.take_renewals(now_s=2.0)
    leases.note(answer(Status.STATUS_RENEWED), now_s=2.0)
    leases.report(lease, StageProgress(step=2, steps=9))
    assert leases.due_s == 3.0


def test_progress_is_sent_once() -> None:
    leases, lease = held()
    leases.report(lease, StageProgress(step=1, steps=9))
    first, second = leases.take_renewals(now_s=1.0)[0], leases.take_renewals(now_s=2.0)[0]
    assert (first.progress.step, first.progress.steps) == (1, 9)
    assert not second.HasField("progress")


def preview(data: bytes) -> Preview:
    async def make() -> MadePreview:
        return MadePreview(data=data)

    return make


async def never(duration_s: float) -> None:
    """The time that a report waits for previews is not over before they are made."""
    await asyncio.Event().wait()


async def at_once(duration_s: float) -> None:
    """It is over at once."""


def report(leases: WorkerLeases, lease: WorkerLease, step: int, data: bytes = b"") -> None:
    leases.report(lease, StageProgress(step=step, steps=99, preview=preview(data) if data else None))


async def test_a_due_preview_outlives_progress_without_one_and_gives_way_to_a_newer() -> None:
    leases, lease = held()
    maker = PreviewMaker(leases, Env(sleep=never))
    for step, data in ((10, b"ten"), (11, b""), (20, b"twenty"), (21, b"")):
        report(leases, lease, step, data)
    await maker.make()
    [renewal] = leases.take_renewals(now_s=1.0)
    assert (renewal.progress.step, renewal.progress.preview) == (21, b"twenty")
    report(leases, lease, 22)
    await maker.make()
    assert leases.take_renewals(now_s=2.0)[0].progress.preview == b""


async def test_a_preview_that_takes_long_goes_with_a_later_report_and_delays_none() -> None:
    leases, lease = held()
    is_decoded = asyncio.Event()

    async def slow() -> MadePreview:
        await is_decoded.wait()
        return MadePreview(data=b"late")

    leases.report(lease, StageProgress(step=10, steps=99, preview=slow))
    await PreviewMaker(leases, Env(sleep=at_once)).make()
    assert leases.take_renewals(now_s=1.0)[0].progress.preview == b""
    leases.note(answer(Status.STATUS_RENEWED), now_s=1.0)
    report(leases, lease, 20, b"twenty")
    leases.take_renewals(now_s=2.0)
    assert leases.due_s > 10.0
    is_decoded.set()
    await PreviewMaker(leases, Env(sleep=never)).make()
    assert leases.due_s == 3.0
    [renewal] = leases.take_renewals(now_s=3.0)
    assert (renewal.progress.step, renewal.progress.preview) == (20, b"late")
    await PreviewMaker(leases, Env(sleep=never)).make()
    assert leases.take_renewals(now_s=4.0)[0].progress.preview == b"twenty"


@pytest.mark.parametrize("cpu_s", [0.012, 0.3, 5.0])
def test_previews_take_a_small_share_of_the_time_whatever_they_cost(cpu_s: float) -> None:
    pace, made = PreviewPace(), 0
    for half_seconds in range(4_000):
        if pace.allows(half_seconds / 2):
            pace.spend(cpu_s)
            made += 1
    assert made * cpu_s <= 2_000 * PreviewPace.SHARE + PreviewPace.CREDIT_S + cpu_s
    # Those that cost little go with every report.
    assert made == 4_000 if cpu_s == 0.012 else made < 4_000


async def test_a_preview_waits_while_earlier_ones_have_taken_too_much_time() -> None:
    now_s = 0.0
    leases, lease = held()
    maker = PreviewMaker(leases, Env(now_s=lambda: now_s, sleep=never))

    async def heavy() -> MadePreview:
        return MadePreview(data=b"heavy", cpu_s=0.6)

    sent = []
    for second in range(0, 40, 5):
        now_s = float(second)
        leases.report(lease, StageProgress(step=second, steps=99, preview=heavy))
        await maker.make()
        sent.append(bool(leases.take_renewals(now_s=now_s)[0].progress.preview))
    assert sent == [True, True, False, False, True, False, False, True]


async def test_a_preview_that_cannot_be_made_costs_nothing_else() -> None:
    leases, lease = held()

    async def broken() -> MadePreview:
        raise NodeFault("no preview")

    leases.report(lease, StageProgress(step=1, steps=9, preview=broken))
    await PreviewMaker(leases, Env(sleep=never)).make()
    [renewal] = leases.take_renewals(now_s=1.0)
    assert (renewal.progress.step, renewal.progress.preview) == (1, b"")


async def test_no_preview_of_ended_work_is_made() -> None:
    leases, lease = held()
    report(leases, lease, 10, b"ten")
    lease.drop_previews()
    await PreviewMaker(leases, Env(sleep=never)).make()
    assert leases.take_renewals(now_s=1.0)[0].progress.preview == b""


def test_a_lease_whose_result_is_on_its_way_is_not_dropped_nor_asked_about_without_end() -> None:
    leases, lease = held()
    lease.is_settled = True
    leases.take_renewals(now_s=10.0)
    leases.note(answer(Status.STATUS_LOST, ttl_s=0.0), now_s=10.0)
    assert leases.tokens == [b"token"]
    assert leases.due_s == 20.0


def test_a_lost_lease_is_held_no_more() -> None:
    leases, _ = held()
    leases.note(answer(Status.STATUS_LOST), now_s=10.0)
    assert leases.tokens == []


def test_a_gateway_that_gives_no_time_does_not_make_the_worker_spin() -> None:
    leases, _ = held()
    leases.note(answer(Status.STATUS_RENEWED, ttl_s=0.0), now_s=10.0)
    assert leases.due_s > 10.0


RENEWED = queue_pb2.RenewedLease.STATUS_RENEWED


def task(token: bytes, ttl_s: float = 30.0) -> queue_pb2.LeasedTask:
    return queue_pb2.LeasedTask(name="jobs/a/tasks/1", lease_token=token, ttl_s=ttl_s)


def test_a_lease_that_an_answer_leaves_out_is_held_and_asked_about_later_and_not_without_end() -> None:
    leases = WorkerLeases(progress_every_s=1.0)
    for token in (b"answered", b"left out"):
        leases.add(task(token), now_s=0.0)
    leases.take_renewals(now_s=10.0)
    leases.note([queue_pb2.RenewedLease(lease_token=b"answered", status=RENEWED, ttl_s=60.0)], now_s=10.0)
    assert leases.tokens == [b"answered", b"left out"]
    assert leases.due_s == 20.0


def test_the_end_of_an_earlier_lease_does_not_drop_a_later_one_under_the_same_token() -> None:
    leases = WorkerLeases(progress_every_s=1.0)
    earlier = leases.add(task(b"t"), now_s=0.0)
    later = leases.add(task(b"t"), now_s=5.0)
    leases.remove(earlier)
    assert list(leases) == [later]
    leases.remove(later)
    assert list(leases) == []
