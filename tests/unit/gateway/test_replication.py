"""Replication scores: they decay with a half-life and are reset by a fetch; fetches stay in a worker's budget."""

from dataclasses import replace

import pytest

from services.gateway.scheduler.replication import (
    DAY_S,
    FAILED_S,
    REST_S,
    SPECULATIVE_WORKERS_MIN,
    Replication,
    ReplicationPolicy,
)
from services.gateway.scheduler.workers import WorkerIndex, WorkerState, WorkerView
from tests.fakes.scheduler import GB, a_task, a_view, kind_of

HALF_S = 100.0
# Absence adds nothing to the score.
POLICY = ReplicationPolicy(half_life_s=HALF_S, absence=0.0)


@pytest.mark.parametrize(("later_s", "left"), [(0.0, 8.0), (50.0, 8.0 * 0.5**0.5), (100.0, 4.0), (300.0, 1.0)])
def test_a_score_halves_in_a_half_life(later_s: float, left: float) -> None:
    replication = Replication(POLICY)
    assert replication.add_loss("a", 16.0, replicas=1, download_s=2.0, now_s=10.0) == 8.0
    assert replication.add_loss("a", 0.0, replicas=1, download_s=2.0, now_s=10.0 + later_s) == pytest.approx(left)


def test_the_score_so_far_decays_and_a_new_loss_counts_whole() -> None:
    replication = Replication(POLICY)
    for number, score in enumerate([4.0, 6.0, 7.0, 7.5]):
        now_s = number * HALF_S
        assert replication.add_loss("a", 4.0, replicas=1, download_s=1.0, now_s=now_s) == pytest.approx(score)


def test_a_gain_does_not_lower_a_score() -> None:
    replication = Replication(POLICY)
    replication.add_loss("a", 5.0, replicas=1, download_s=1.0, now_s=0.0)
    assert replication.add_loss("a", -3.0, replicas=1, download_s=1.0, now_s=0.0) == 5.0


def test_few_replicas_raise_the_score_because_all_of_them_may_be_away() -> None:
    policy = replace(POLICY, absence=0.5)
    scores = [Replication(policy).add_loss("a", 0.0, replicas, download_s=8.0, now_s=0.0) for replicas in (0, 1, 2, 3)]
    assert scores == [0.5, 0.5, 0.25, 0.125]


def test_a_fetch_resets_the_score_of_its_model_alone_and_the_model_rests_for_a_while() -> None:
    replication = Replication(POLICY)
    for model in "ab":
        replication.add_loss(model, 5.0, replicas=1, download_s=1.0, now_s=0.0)
    assert not replication.is_resting("a", 0.0)
    replication.reset("a", 0.0)
    assert replication.add_loss("a", 1.0, replicas=1, download_s=1.0, now_s=0.0) == 1.0
    assert replication.add_loss("b", 1.0, replicas=1, download_s=1.0, now_s=0.0) == 6.0
    assert [replication.is_resting("a", now_s) for now_s in (0.0, REST_S - 0.1, REST_S)] == [True, True, False]
    assert not replication.is_resting("b", 0.0)


def test_a_workers_budget_for_fetches_ahead_is_full_again_after_a_day() -> None:
    replication = Replication(replace(POLICY, day_bytes=3 * GB))
    worker = WorkerState(a_view(), 0.0)
    worker.fetched_bytes = 2 * GB
    assert replication.has_budget(worker, "b", 0.0)
    worker.fetched_bytes += 1
    assert not replication.has_budget(worker, "b", DAY_S - 1.0)
    assert replication.has_budget(worker, "b", DAY_S)
    assert worker.fetched_bytes == 0
    worker.fetched_bytes = 3 * GB
    assert not replication.has_budget(worker, "b", 2 * DAY_S - 1.0)


def an_index(*views: WorkerView) -> tuple[WorkerIndex, list[WorkerState]]:
    index, workers = WorkerIndex(), [WorkerState(view, 0.0) for view in views]
    for worker in workers:
        index.add(worker)
    return index, workers


def test_only_the_faster_half_of_a_fleet_prefetches_speculatively() -> None:
    views = [a_view(f"w{i}", step_s=0.1 * (i + 1), disk_bytes=100 * GB) for i in range(SPECULATIVE_WORKERS_MIN)]
    index, workers = an_index(*views)
    found = [Replication().speculative(index, worker, 0.0) for worker in workers]
    half = SPECULATIVE_WORKERS_MIN // 2
    assert found[:half] == ["b"] * half
    assert found[half + 1 :] == [""] * (half - 1)


def test_a_worker_that_could_not_fetch_a_small_model_is_not_asked_for_it_again_for_a_while() -> None:
    index, (quick, slow) = an_index(a_view("quick", step_s=0.1), a_view("slow", step_s=0.3))
    task = a_task("t", kind=kind_of("a", "l"))
    assert Replication().small_model_target(index, task, "l", 0.0) is quick
    quick.failed["l"] = 0.0
    assert Replication().small_model_target(index, task, "l", FAILED_S - 1.0) is slow
    assert Replication().small_model_target(index, task, "l", FAILED_S) is quick
