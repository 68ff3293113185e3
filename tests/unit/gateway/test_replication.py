"""What is owed to a model: it fades by half in a time, is settled by a fetch, and comes beside a worker's budget."""

from dataclasses import replace

import pytest

from services.gateway.ordering.crowds import Crowds
from services.gateway.ordering.posts import Post
from services.gateway.ordering.replication import DAY_S, FAILED_S, REST_S, UNASKED_WORKERS_MIN, Replication, Terms
from services.gateway.ordering.tasks import WorkerView
from tests.fakes.board import GB, a_task, a_view, kind_of

HALF_S = 100.0
# Lone copies are owed nothing for their absence.
TERMS = Terms(half_life_s=HALF_S, absence=0.0)


@pytest.mark.parametrize(("later_s", "left"), [(0.0, 8.0), (50.0, 8.0 * 0.5**0.5), (100.0, 4.0), (300.0, 1.0)])
def test_what_is_owed_fades_by_half_in_a_half_life(later_s: float, left: float) -> None:
    replication = Replication(TERMS)
    assert replication.owe("a", 16.0, copies=1, download_s=2.0, now_s=10.0) == 8.0
    assert replication.owe("a", 0.0, copies=1, download_s=2.0, now_s=10.0 + later_s) == pytest.approx(left)


def test_what_fades_is_what_was_owed_and_what_is_lost_now_comes_whole() -> None:
    replication = Replication(TERMS)
    for number, owed in enumerate([4.0, 6.0, 7.0, 7.5]):
        now_s = number * HALF_S
        assert replication.owe("a", 4.0, copies=1, download_s=1.0, now_s=now_s) == pytest.approx(owed)


def test_a_gain_is_no_debt_and_takes_nothing_off_one() -> None:
    replication = Replication(TERMS)
    replication.owe("a", 5.0, copies=1, download_s=1.0, now_s=0.0)
    assert replication.owe("a", -3.0, copies=1, download_s=1.0, now_s=0.0) == 5.0


def test_a_model_with_few_copies_is_owed_for_the_time_that_all_of_them_may_be_away() -> None:
    terms = replace(TERMS, absence=0.5)
    owed = [Replication(terms).owe("a", 0.0, copies=copies, download_s=8.0, now_s=0.0) for copies in (0, 1, 2, 3)]
    assert owed == [0.5, 0.5, 0.25, 0.125]


def test_a_fetch_settles_what_is_owed_to_its_model_alone_and_the_model_rests_a_while() -> None:
    replication = Replication(TERMS)
    for model in "ab":
        replication.owe(model, 5.0, copies=1, download_s=1.0, now_s=0.0)
    assert not replication.rests("a", 0.0)
    replication.settle("a", 0.0)
    assert replication.owe("a", 1.0, copies=1, download_s=1.0, now_s=0.0) == 1.0
    assert replication.owe("b", 1.0, copies=1, download_s=1.0, now_s=0.0) == 6.0
    assert [replication.rests("a", now_s) for now_s in (0.0, REST_S - 0.1, REST_S)] == [True, True, False]
    assert not replication.rests("b", 0.0)


def test_a_workers_budget_for_fetches_ahead_is_full_again_after_a_day() -> None:
    replication = Replication(replace(TERMS, day_bytes=3 * GB))
    post = Post(a_view(), 0.0)
    post.fetched_bytes = 2 * GB
    assert replication.has_budget(post, "b", 0.0)
    post.fetched_bytes += 1
    assert not replication.has_budget(post, "b", DAY_S - 1.0)
    assert replication.has_budget(post, "b", DAY_S)
    assert post.fetched_bytes == 0
    post.fetched_bytes = 3 * GB
    assert not replication.has_budget(post, "b", 2 * DAY_S - 1.0)


def a_crowd(*views: WorkerView) -> tuple[Crowds, list[Post]]:
    crowds, posts = Crowds(), [Post(view, 0.0) for view in views]
    for post in posts:
        crowds.add(post)
    return crowds, posts


def test_only_the_quicker_half_of_a_fleet_fetches_unasked() -> None:
    views = [
        a_view(f"w{number}", step_s=0.1 * (number + 1), disk_bytes=100 * GB) for number in range(UNASKED_WORKERS_MIN)
    ]
    crowds, posts = a_crowd(*views)
    found = [Replication().unasked(crowds, post, 0.0) for post in posts]
    half = UNASKED_WORKERS_MIN // 2
    assert found[:half] == ["b"] * half
    assert found[half + 1 :] == [""] * (half - 1)


def test_a_worker_that_could_not_fetch_a_small_model_is_not_asked_for_it_again_for_a_while() -> None:
    crowds, (quick, slow) = a_crowd(a_view("quick", step_s=0.1), a_view("slow", step_s=0.3))
    task = a_task("t", kind=kind_of("a", "l"))
    assert Replication().small_target(crowds, task, "l", 0.0) is quick
    quick.failed["l"] = 0.0
    assert Replication().small_target(crowds, task, "l", FAILED_S - 1.0) is slow
    assert Replication().small_target(crowds, task, "l", FAILED_S) is quick
