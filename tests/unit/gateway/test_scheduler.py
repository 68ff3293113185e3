"""Which task a worker gets, and who fetches what ahead."""

from dataclasses import replace
from typing import Any

import pytest

from services.gateway.scheduler.estimate import PATCH_S, best_of, estimate, load_s
from services.gateway.scheduler.explain import Verdict, explain
from services.gateway.scheduler.queue import TaskKind, WaitingTask
from services.gateway.scheduler.replication import (
    FAILED_S,
    FETCHES_LIMIT,
    REST_S,
    SPECULATIVE_WORKERS_MIN,
    Replication,
    ReplicationPolicy,
)
from services.gateway.scheduler.schedule import STICKY_LIMIT_S, Scheduler
from services.gateway.scheduler.workers import ABLE_LIMIT, WorkerView
from tests.fakes.scheduler import A, B, a_task, a_view, kind_of

GB = 10**9


def a_scheduler(*views: Any, **policy: Any) -> Scheduler:
    scheduler = Scheduler(Replication(ReplicationPolicy(**policy)))
    for view in views:
        scheduler.seen(view, 0.0)
        scheduler.asks(view.id, 0.0)
    return scheduler


def got(scheduler: Scheduler, worker: str = "w", *, limit: int = 1, now_s: float = 0.0) -> list[str]:
    chosen = scheduler.choose(worker, limit, now_s)
    for task in chosen:
        scheduler.remove(task.key)
        scheduler.started(worker, task, now_s)
    return [task.key[0] for task in chosen]


def add(scheduler: Scheduler, *tasks: WaitingTask, now_s: float = 0.0) -> None:
    for task in tasks:
        scheduler.add(task, now_s)


def test_what_came_first_goes_first() -> None:
    scheduler = a_scheduler(a_view())
    add(scheduler, a_task("late", rank_s=2.0), a_task("early", rank_s=1.0))
    assert got(scheduler) == ["early"]


def test_only_what_a_worker_offers_is_planned_for_it() -> None:
    scheduler = a_scheduler(a_view(offers=frozenset({"checkpoint:a"})))
    add(scheduler, a_task("b", kind=B))
    assert got(scheduler) == []
    assert scheduler.planned_at(("b", 1)) is None
    scheduler.seen(a_view("other", held=frozenset({"b"})), 1.0)
    assert got(scheduler, "other", now_s=1.0) == ["b"]


def test_a_task_goes_to_the_worker_that_finishes_it_first() -> None:
    scheduler = a_scheduler(a_view("slow", step_s=1.0), a_view("quick", step_s=0.1))
    add(scheduler, a_task("1"))
    assert got(scheduler, "slow") == []
    assert got(scheduler, "quick") == ["1"]


def test_queued_work_counts_so_that_a_quick_worker_is_not_waited_for_in_vain() -> None:
    scheduler = a_scheduler(a_view("slow", step_s=0.3), a_view("quick", step_s=0.1))
    add(scheduler, *(a_task(str(i), rank_s=i) for i in range(8)))
    assert len(got(scheduler, "quick", limit=8)) + len(got(scheduler, "slow", limit=8)) == 8
    assert scheduler.worker("slow").running


def test_a_checkpoint_that_is_elsewhere_is_not_fetched_for_a_task_that_can_wait() -> None:
    holder = a_view("holder", held=frozenset({"a"}))
    scheduler = a_scheduler(holder, a_view("empty", held=frozenset(), step_s=0.1), price=100.0)
    add(scheduler, a_task("1"), a_task("2", rank_s=1.0))
    assert got(scheduler, "empty") == []
    assert scheduler.fetches("empty") == []
    assert got(scheduler, "holder") == ["1"]


def test_a_backlog_that_is_worth_more_than_the_download_makes_one_more_worker_fetch() -> None:
    scheduler = a_scheduler(
        a_view("holder", held=frozenset({"a"}), step_s=1.0), a_view("empty", held=frozenset()), price=1.0
    )
    add(scheduler, *(a_task(str(i), rank_s=i) for i in range(8)))
    assert [fetch.model for fetch in scheduler.fetches("empty")] == ["a"]
    (claim,) = scheduler.take_claims()
    assert (claim.worker, claim.fetch.model) == ("empty", "a")
    # The tasks stay where they are until it has come.
    assert got(scheduler, "empty") == []


def test_a_fetch_that_another_gateway_has_done_already_is_dropped() -> None:
    scheduler = a_scheduler(a_view("here", held=frozenset()), a_view("there", held=frozenset(), link_bps=10e6))
    add(scheduler, a_task("1"))
    (claim,) = scheduler.take_claims()
    assert claim.worker == "here"
    scheduler.refuse(claim, "there", 1.0)
    assert scheduler.fetches("here") == []
    assert scheduler.planned_at(("1", 1)).view.id == "there"


def test_a_small_model_is_fetched_where_the_checkpoint_lies() -> None:
    lora = kind_of("a", "l")
    scheduler = a_scheduler(a_view(held=frozenset({"a"})), a_view("empty", held=frozenset({"l"})))
    add(scheduler, a_task("1", kind=lora))
    assert [fetch.model for fetch in scheduler.fetches("w")] == ["l"]
    assert got(scheduler) == []
    scheduler.seen(a_view(held=frozenset({"a", "l"})), 20.0)
    assert got(scheduler, now_s=20.0) == ["1"]


def test_a_worker_that_fetches_nothing_ahead_gets_the_task_at_once() -> None:
    scheduler = a_scheduler(a_view(held=frozenset(), takes_fetches=False))
    add(scheduler, a_task("1"))
    assert got(scheduler) == ["1"]


def test_a_fetch_that_does_not_come_is_given_up_and_the_task_tried_so_that_the_worker_says_why() -> None:
    scheduler = a_scheduler(a_view(held=frozenset({"a"})))
    add(scheduler, a_task("1", kind=kind_of("a", "l")))
    assert got(scheduler, now_s=30.0) == []
    assert got(scheduler, now_s=1_000.0) == ["1"]


def test_a_task_whose_model_could_not_be_fetched_ahead_is_tried_at_once() -> None:
    scheduler = a_scheduler(a_view(held=frozenset({"a"})))
    add(scheduler, a_task("1", kind=kind_of("a", "l")))
    assert got(scheduler) == []
    scheduler.seen(a_view(held=frozenset({"a"}), unfetched=frozenset({"l"})), 1.0)
    assert got(scheduler, now_s=1.0) == ["1"]
    assert scheduler.fetches("w") == []


def test_small_models_go_before_checkpoints_on_a_link() -> None:
    scheduler = a_scheduler(a_view(held=frozenset({"a"})))
    add(scheduler, a_task("b", kind=B), a_task("l", kind=kind_of("a", "l")))
    assert [fetch.model for fetch in scheduler.fetches("w")] == ["l", "b"]


def test_a_worker_has_only_so_many_models_on_their_way() -> None:
    scheduler = a_scheduler(a_view(held=frozenset({"a"})))
    add(scheduler, *(a_task(str(i), kind=kind_of("a", f"l{i}")) for i in range(2 * FETCHES_LIMIT)))
    assert len(scheduler.fetches("w")) == FETCHES_LIMIT


def test_a_day_of_fetching_ahead_is_bounded() -> None:
    scheduler = a_scheduler(
        a_view("holder", held=frozenset({"a"}), step_s=1.0), a_view("empty", held=frozenset()), day_bytes=GB // 2
    )
    add(scheduler, *(a_task(str(i), rank_s=i) for i in range(20)))
    assert scheduler.fetches("empty") == []


def a_fleet(count: int) -> list[WorkerView]:
    """Empty, with room; the later ones are slower."""
    return [
        a_view(str(i), held=frozenset(), disk_bytes=100 * GB, step_s=0.1 + 0.1 * i, link_bps=100e6)
        for i in range(count)
    ]


def speculative_of(scheduler: Scheduler) -> dict[str, str]:
    """What workers that ask are to fetch, and which."""
    for worker in scheduler.workers:
        assert got(scheduler, worker) == []
    return {fetch.model: worker for worker in scheduler.workers for fetch in scheduler.fetches(worker)}


def test_idle_workers_of_a_fleet_prefetch_checkpoints_without_a_replica_once_and_the_slower_half_does_not() -> None:
    found = speculative_of(a_scheduler(*a_fleet(SPECULATIVE_WORKERS_MIN)))
    assert sorted(found) == ["a", "b"]
    assert all(int(worker) < SPECULATIVE_WORKERS_MIN / 2 for worker in found.values())


def test_a_few_workers_prefetch_nothing_speculatively() -> None:
    assert speculative_of(a_scheduler(*a_fleet(SPECULATIVE_WORKERS_MIN - 1))) == {}


def test_nothing_is_prefetched_speculatively_where_that_is_turned_off_or_the_disk_has_no_room_for_it() -> None:
    fleet = a_fleet(SPECULATIVE_WORKERS_MIN)
    assert speculative_of(a_scheduler(*fleet, speculative_share=0.0)) == {}
    assert speculative_of(a_scheduler(*(replace(view, disk_bytes=GB) for view in fleet))) == {}
    assert speculative_of(a_scheduler(*(replace(view, disk_bytes=0) for view in fleet))) == {}
    assert speculative_of(a_scheduler(*fleet, day_bytes=GB // 2)) == {}


def test_a_failed_speculative_prefetch_is_not_repeated_for_a_while() -> None:
    fleet = a_fleet(SPECULATIVE_WORKERS_MIN)
    scheduler = a_scheduler(*fleet)
    reported = []
    for turn in range(6):
        assert got(scheduler, "0", now_s=turn) == []
        reported += [fetch.model for fetch in scheduler.fetches("0")]
        scheduler.seen(replace(fleet[0], unfetched=frozenset(reported)), float(turn))
    assert sorted(reported) == ["a", "b"]
    assert got(scheduler, "0", now_s=FAILED_S + 10.0) == []
    assert scheduler.fetches("0") != [], "perhaps it can by now"


def test_a_worker_that_could_not_fetch_a_checkpoint_does_not_get_the_next_replica() -> None:
    failing = a_view("failing", held=frozenset(), step_s=0.01)
    scheduler = a_scheduler(a_view("holder", held=frozenset({"a"}), step_s=1.0), failing, price=1.0)
    add(scheduler, *(a_task(str(i), rank_s=i) for i in range(8)))
    assert [fetch.model for fetch in scheduler.fetches("failing")] == ["a"]
    add(scheduler, a_task("late", rank_s=8.0), now_s=1.0)
    assert scheduler.planned_at(("late", 1)) is scheduler.worker("failing")
    scheduler.seen(replace(failing, unfetched=frozenset({"a"})), 2.0)
    assert scheduler.planned_at(("late", 1)) is scheduler.worker("holder"), "who can do it without fetching anything"
    add(scheduler, *(a_task(f"more{i}", rank_s=i) for i in range(8)), now_s=10.0)
    assert scheduler.fetches("failing") == []


def test_a_checkpoint_that_many_hold_must_be_missed_more_to_be_fetched_once_more() -> None:
    def replicas_after(holders: int) -> int:
        views = [a_view(f"h{i}", held=frozenset({"a"})) for i in range(holders)]
        scheduler = a_scheduler(*views, a_view("empty", held=frozenset(), step_s=0.01), absence=0.0)
        for i in range(40):
            add(scheduler, a_task(str(i), rank_s=i), now_s=i * REST_S)
            assert len(got(scheduler, f"h{i % holders}", now_s=i * REST_S)) <= 1
            scheduler.ended((str(i), 1), i * REST_S)
            if scheduler.fetches("empty"):
                return i
        return 40

    assert replicas_after(1) < replicas_after(12)


def test_a_worker_that_must_load_a_checkpoint_is_passed_over_for_one_that_has_it_ready() -> None:
    cold = a_view("cold", held=frozenset({"a"}), step_s=0.10)
    warm = a_view("warm", held=frozenset({"a"}), vram=frozenset({"a"}), step_s=0.15)
    scheduler = a_scheduler(cold, warm)
    add(scheduler, a_task("1"))
    worker = scheduler.planned_at(("1", 1))
    assert worker is not None
    assert worker.view.id == "warm"


def test_tasks_of_a_checkpoint_are_planned_together_and_only_the_first_pays_for_loading() -> None:
    scheduler = a_scheduler(a_view(held=frozenset({"a"})))
    add(scheduler, a_task("1"), a_task("2", rank_s=1.0))
    worker = scheduler.planned_at(("2", 1))
    assert worker is not None
    assert worker.wait_s(0.0) == pytest.approx(2 * 20 * 0.2 + load_s(worker, "a"))


def test_of_two_alike_the_one_that_did_the_same_combination_before_has_its_patches_still() -> None:
    held = frozenset({"a", "l"})
    scheduler = a_scheduler(
        a_view("v", held=held, vram=frozenset({"a"})), a_view("w", held=held, vram=frozenset({"a"}))
    )
    other, same = kind_of("a"), kind_of("a", "l")
    worker = {name: scheduler.worker(name) for name in ("v", "w")}
    for name, kind in (("v", other), ("w", same)):
        task = a_task(name, kind=kind)
        scheduler.started(name, task, 0.0)
        scheduler.ended(task.key, 4.0)
    add(scheduler, a_task("next", kind=same), now_s=5.0)
    assert scheduler.planned_at(("next", 1)) is worker["w"]
    assert got(scheduler, "w", now_s=5.0) == ["next"]


def test_what_is_planned_in_between_costs_the_patches() -> None:
    scheduler = a_scheduler(a_view(held=frozenset({"a", "l"})))
    same = a_task("same", kind=kind_of("a", "l"))
    scheduler.started("w", same, 0.0)
    worker = scheduler.worker("w")
    assert worker is not None
    again = replace(same, key=("again", 1))
    assert estimate(worker, again, 1.0).patch_s == 0.0
    add(scheduler, a_task("between"))
    assert estimate(worker, again, 1.0).patch_s == PATCH_S
    assert estimate(worker, again, 1.0, ahead_s=0.0).patch_s == 0.0
    best = best_of([worker], again, 1.0)
    assert best is not None
    assert best.cost_s == pytest.approx(estimate(worker, again, 1.0).cost_s)


def test_a_worker_keeps_to_the_checkpoint_on_its_device_until_another_has_waited_too_long() -> None:
    both = a_view(held=frozenset({"a", "b"}), vram=frozenset({"a"}))
    tasks = a_task("first", kind=B), a_task("second", rank_s=1.0)
    scheduler = a_scheduler(both)
    add(scheduler, *tasks)
    assert got(scheduler) == ["second"]
    scheduler = a_scheduler(both)
    add(scheduler, *tasks)
    assert got(scheduler, now_s=STICKY_LIMIT_S) == ["first"]


def test_a_batch_is_of_one_kind_and_in_order() -> None:
    scheduler = a_scheduler(a_view())
    wide = replace(A, width_px=512)
    add(scheduler, a_task("1"), a_task("2", kind=wide, rank_s=1.0), a_task("3", rank_s=3.0), a_task("4", rank_s=2.0))
    assert got(scheduler, limit=8) == ["1", "4", "3"]


def test_a_batch_leaves_their_share_to_workers_that_wait_idle() -> None:
    scheduler = a_scheduler(a_view("1"), a_view("2"), a_view("3"))
    add(scheduler, *(a_task(str(i), rank_s=i) for i in range(6)))
    assert [len(got(scheduler, worker, limit=8)) for worker in ("1", "2", "3")] == [2, 2, 2]


def test_a_task_that_must_run_alone_comes_alone() -> None:
    scheduler = a_scheduler(a_view())
    add(scheduler, a_task("1", alone=True), a_task("2", rank_s=1.0))
    assert got(scheduler, limit=8) == ["1"]
    scheduler = a_scheduler(a_view())
    add(scheduler, a_task("1"), a_task("2", rank_s=1.0, alone=True), a_task("3", rank_s=2.0))
    assert got(scheduler, limit=8) == ["1", "3"]


def test_a_node_that_failed_a_task_leaves_it_to_another_while_there_is_one() -> None:
    failed = a_task("1", failed_nodes=frozenset({"node-w"}))
    scheduler = a_scheduler(a_view(), a_view("other"))
    add(scheduler, failed)
    assert got(scheduler) == []
    scheduler.gone("other", 1.0)
    assert got(scheduler, now_s=1.0) == ["1"]


BROKEN = replace(kind_of("a", "l"), parts=frozenset({"checkpoint:a", "lora:l"}))
SOUND = replace(A, parts=frozenset({"checkpoint:a"}))


def test_a_worker_that_is_avoided_for_a_part_gets_all_else_and_that_only_where_no_other_can_do_it() -> None:
    view = a_view(held=frozenset({"a", "l"}), avoided=frozenset({"lora:l"}))
    other = a_view("other", held=frozenset({"a", "l"}))
    scheduler = a_scheduler(view, other)
    add(scheduler, a_task("1", kind=BROKEN), a_task("2", kind=SOUND, rank_s=1.0))
    assert got(scheduler) == ["2"]
    scheduler.gone("other", 1.0)
    assert got(scheduler, now_s=1.0) == ["1"]


def test_tasks_planned_at_an_avoided_worker_go_to_one_that_came_later() -> None:
    scheduler = a_scheduler(a_view(held=frozenset({"a", "l"}), avoided=frozenset({"stage:diffusion"})))
    add(scheduler, a_task("1", kind=BROKEN), a_task("2", kind=SOUND, rank_s=1.0))
    scheduler.seen(a_view("other", held=frozenset({"a", "l"})), 0.0)
    assert got(scheduler) == []
    assert scheduler.planned_at(("2", 1)).view.id == "other"


def test_many_waiting_tasks_of_a_broken_part_do_not_hide_others_from_an_avoided_worker() -> None:
    scheduler = a_scheduler(a_view("other", held=frozenset({"a", "l"})))
    add(
        scheduler,
        *(a_task(f"{i}", kind=BROKEN, rank_s=float(i)) for i in range(20)),
        a_task("z", kind=SOUND, rank_s=99.0),
    )
    scheduler.seen(a_view(held=frozenset({"a", "l"}), avoided=frozenset({"lora:l"})), 0.0)
    assert got(scheduler) == ["z"]


def test_a_node_retries_a_checkpoint_that_no_other_node_can_fetch() -> None:
    failed = a_task("1", failed_nodes=frozenset({"node-w"}))
    scheduler = a_scheduler(a_view(held=frozenset()))
    add(scheduler, failed)
    assert [fetch.model for fetch in scheduler.fetches("w")] == ["a"]
    scheduler = a_scheduler(a_view(held=frozenset()), a_view("other", held=frozenset()))
    add(scheduler, failed)
    assert scheduler.fetches("w") == []
    assert [fetch.model for fetch in scheduler.fetches("other")] == ["a"]


def test_what_was_planned_for_a_worker_that_is_gone_goes_elsewhere() -> None:
    scheduler = a_scheduler(a_view("1"), a_view("2", step_s=1.0))
    add(scheduler, a_task("t"))
    assert scheduler.planned_at(("t", 1)).view.id == "1"
    scheduler.gone("1", 1.0)
    assert got(scheduler, "2", now_s=1.0) == ["t"]


def test_what_is_late_elsewhere_is_taken_by_whoever_asks() -> None:
    scheduler = a_scheduler(a_view("quick"), a_view("slow", step_s=1.0))
    add(scheduler, a_task("t"))
    assert got(scheduler, "slow", now_s=1.0) == []
    assert got(scheduler, "slow", now_s=60.0) == ["t"]


def test_a_worker_that_lost_its_checkpoint_loses_what_was_planned_for_it() -> None:
    scheduler = a_scheduler(a_view("1"), a_view("2", step_s=1.0))
    add(scheduler, a_task("t"))
    scheduler.seen(a_view("1", held=frozenset({"b"})), 1.0)
    assert scheduler.planned_at(("t", 1)).view.id == "2"


def test_explaining_says_why_each_worker_is_not_the_one() -> None:
    lora = kind_of("a", "l")
    poor = a_view("poor", offers=frozenset({"checkpoint:a"}))
    scheduler = a_scheduler(
        a_view("best", held=frozenset({"a", "l"})),
        a_view("far", held=frozenset()),
        a_view("once", held=frozenset({"a", "l"})),
        poor,
    )
    task = a_task("t", kind=lora, failed_nodes=frozenset({"node-once"}))
    add(scheduler, task)
    explained = explain(scheduler, task, 0.0)
    assert explained.place.worker == "best"
    verdicts = {each.worker: each.verdict for each in explained.workers}
    assert verdicts == {
        "best": Verdict.PLANNED,
        "far": Verdict.SLOWER,
        "once": Verdict.FAILED_IT,
        "poor": Verdict.OFFERS_TOO_LITTLE,
    }
    by_worker = {each.worker: each for each in explained.workers}
    assert by_worker["poor"].missing == ("lora:l",)
    assert by_worker["far"].estimate.fetch_bytes == GB + GB // 10


def test_explaining_calls_no_worker_slower_that_would_be_sooner_by_now() -> None:
    scheduler = a_scheduler(a_view("early"))
    task = a_task("t")
    add(scheduler, task)
    scheduler.seen(a_view("early", step_s=9.0), 1.0)
    scheduler.seen(a_view("late"), 1.0)
    verdicts = {each.worker: each.verdict for each in explain(scheduler, task, 1.0).workers}
    assert verdicts == {"early": Verdict.PLANNED, "late": Verdict.SOONER}


def test_explaining_says_when_no_worker_has_all_of_it_together() -> None:
    scheduler = a_scheduler(a_view("1", offers=frozenset({"checkpoint:a"})), a_view("2", offers=frozenset({"lora:l"})))
    task = a_task("t", kind=kind_of("a", "l"))
    add(scheduler, task)
    explained = explain(scheduler, task, 0.0)
    assert explained.place is None
    assert explained.why == "no worker offers all that it needs; 1 comes nearest and lacks lora:l"


SMALL_IMAGE, LARGE_IMAGE = replace(A, amounts=(("pixels", 4_096),)), replace(A, amounts=(("pixels", 16_384),))


def a_mixed_fleet() -> Scheduler:
    """One takes small images and is quick, one takes large ones, and one takes any but has too few layers."""
    return a_scheduler(
        a_view("small", limits=(("pixels", 4_096),), step_s=0.01),
        a_view("large", limits=(("images", 1), ("pixels", 16_384))),
        a_view("odd", limits=(("text_encoder_layers:a", 10),), step_s=1.0),
    )


def test_in_a_fleet_of_unequal_workers_a_task_goes_to_one_that_takes_it() -> None:
    scheduler = a_mixed_fleet()
    skipping = replace(LARGE_IMAGE, amounts=(("pixels", 20_000), ("text_encoder_layers:a", 11)))
    add(
        scheduler,
        a_task("large", kind=LARGE_IMAGE),
        a_task("small", kind=SMALL_IMAGE, rank_s=1.0),
        a_task("none", kind=skipping, rank_s=2.0),
    )
    assert got(scheduler, "small", limit=8) == ["small"]
    assert got(scheduler, "large", limit=8) == ["large"]
    assert scheduler.planned_at(("none", 1)) is None
    scheduler.seen(a_view("new", limits=(("text_encoder_layers:a", 11),)), 1.0)
    assert got(scheduler, "new", now_s=1.0) == ["none"]


def test_a_worker_whose_limits_fall_loses_what_it_takes_no_more() -> None:
    scheduler = a_scheduler(a_view("first"), a_view("second", step_s=1.0))
    add(scheduler, a_task("t", kind=LARGE_IMAGE))
    assert scheduler.planned_at(("t", 1)).view.id == "first"
    scheduler.seen(a_view("first", limits=(("pixels", 4_096),)), 1.0)
    assert scheduler.planned_at(("t", 1)).view.id == "second"
    scheduler.seen(a_view("second", limits=(("pixels", 4_096),)), 2.0)
    assert scheduler.planned_at(("t", 1)) is None
    scheduler.seen(a_view("first"), 3.0)
    assert got(scheduler, "first", now_s=3.0) == ["t"]


def test_large_images_at_the_head_of_a_queue_hide_no_small_ones_from_a_worker_that_takes_only_those() -> None:
    scheduler = a_scheduler(a_view("large"))
    add(scheduler, *(a_task(f"large{i}", kind=LARGE_IMAGE, rank_s=i) for i in range(20)))
    add(scheduler, a_task("small", kind=SMALL_IMAGE, rank_s=100.0))
    assert scheduler.planned_at(("small", 1)).view.id == "large"
    small = a_view("small", limits=(("pixels", 4_096),))
    scheduler.seen(small, 1.0)
    scheduler.asks("small", 1.0)
    assert got(scheduler, "small", now_s=1.0) == ["small"]


def test_no_worker_fetches_a_checkpoint_for_images_that_it_does_not_take() -> None:
    scheduler = a_scheduler(
        a_view("small", held=frozenset(), limits=(("pixels", 4_096),), step_s=0.01), a_view("large", held=frozenset())
    )
    add(scheduler, a_task("t", kind=LARGE_IMAGE))
    assert scheduler.fetches("small") == []
    assert [fetch.model for fetch in scheduler.fetches("large")] == ["a"]


def test_explaining_says_which_limits_are_too_low() -> None:
    scheduler = a_mixed_fleet()
    task = a_task("t", kind=replace(kind_of("c"), amounts=(("pixels", 16_384), ("text_encoder_layers:a", 12))))
    add(scheduler, task)
    explained = explain(scheduler, task, 0.0)
    missing = {each.worker: each.missing for each in explained.workers}
    assert missing == {
        "small": ("checkpoint:c", "pixels: takes 4096, 16384 needed"),
        "large": ("checkpoint:c",),
        "odd": ("checkpoint:c", "text_encoder_layers:a: takes 10, 12 needed"),
    }
    why = {each.worker: each.why for each in explained.workers}["small"]
    assert why == "it does not offer checkpoint:c; its limits are too low (pixels: takes 4096, 16384 needed)"
    assert {each.verdict for each in explained.workers} == {Verdict.OFFERS_TOO_LITTLE}
    scheduler.seen(a_view("small", offers=frozenset({"checkpoint:c"}), limits=(("pixels", 4_096),)), 1.0)
    scheduler.gone("large", 1.0)
    scheduler.gone("odd", 1.0)
    assert "small comes nearest and lacks pixels: takes 4096, 16384 needed" in explain(scheduler, task, 1.0).why


def test_what_can_do_a_kind_is_known_of_so_many_kinds() -> None:
    scheduler = a_scheduler(a_view())
    for number in range(ABLE_LIMIT + 10):
        scheduler.index.able(replace(A, amounts=(("pixels", number),)))
    assert len(scheduler.index._able) == ABLE_LIMIT
    assert list(scheduler.index.able(A)) == [scheduler.index.like(scheduler.worker("w"))]


def test_of_many_groups_of_workers_some_are_looked_at_and_others_the_next_time() -> None:
    scheduler = a_scheduler(*(a_view(f"w{i}", limits=(("pixels", 10_000 + i),)) for i in range(30)))
    looks = [{worker.view.id for worker in scheduler.index.sample_able(A, 10)} for _ in range(3)]
    assert [len(look) for look in looks] == [10, 10, 10]
    assert len(set.union(*looks)) == 30
    assert len(list(scheduler.index.sample_able(replace(A, amounts=(("pixels", 10_025),)), 10))) == 5


def test_work_without_a_checkpoint_goes_to_whoever_is_free_first() -> None:
    canny = TaskKind(stage="preprocess", needs=frozenset({"annotator:canny"}))
    views = [a_view(name, stage="preprocess", offers=canny.needs, task_s=0.5) for name in ("1", "2")]
    scheduler = a_scheduler(*views)
    add(scheduler, *(a_task(str(i), kind=canny, rank_s=i, steps=0) for i in range(4)))
    assert [len(got(scheduler, view.id, limit=8)) for view in views] == [2, 2]


def test_a_worker_of_another_stage_that_says_to_hold_the_checkpoint_gets_none_of_its_tasks() -> None:
    claims = a_view("claims", stage="preprocess", offers=frozenset(), step_s=1e-9, link_bps=1e15)
    scheduler = a_scheduler(claims, a_view("honest"))
    add(scheduler, *(a_task(str(i), rank_s=i) for i in range(4)))
    assert got(scheduler, "claims", limit=8) == []
    assert got(scheduler, "honest", limit=8) == ["0", "1", "2", "3"]
    # Nor where no other worker is left, and nor if it was of the stage before.
    scheduler.gone("honest", 1.0)
    add(scheduler, a_task("late"), now_s=1.0)
    assert got(scheduler, "claims", now_s=1.0) == []
    scheduler.seen(a_view("moved"), 2.0)
    scheduler.seen(replace(claims, id="moved"), 3.0)
    assert got(scheduler, "moved", now_s=3.0) == []
    scheduler.seen(a_view("moved"), 4.0)
    assert got(scheduler, "moved", now_s=4.0) == ["late"]
