"""What a gateway leaves out of its answer, and a token that comes a second time."""

from fanlight.queue.v1 import queue_pb2
from services.worker.leases import WorkerLeases

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
