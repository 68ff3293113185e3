"""Which task a worker gets, and who fetches what ahead."""

from dataclasses import replace
from typing import Any

import pytest

from services.gateway.ordering.board import STICKY_LIMIT_S, Board
from services.gateway.ordering.crowds import ABLE_LIMIT
from services.gateway.ordering.estimate import PATCH_S, best_of, estimate, load_s
from services.gateway.ordering.explain import Verdict, explain
from services.gateway.ordering.fetches import FETCHES_LIMIT
from services.gateway.ordering.replication import FAILED_S, REST_S, UNASKED_WORKERS_MIN, Replication, Terms
from services.gateway.ordering.tasks import Kind, Waiting, WorkerView
from tests.fakes.board import A, B, a_task, a_view, kind_of

GB = 10**9


def a_board(*views: Any, **terms: Any) -> Board:
    board = Board(Replication(Terms(**terms)))
    for view in views:
        board.seen(view, 0.0)
        board.asks(view.id, 0.0)
    return board


def got(board: Board, worker: str = "w", *, limit: int = 1, now_s: float = 0.0) -> list[str]:
    chosen = board.choose(worker, limit, now_s)
    for task in chosen:
        board.remove(task.key)
        board.started(worker, task, now_s)
    return [task.key[0] for task in chosen]


def add(board: Board, *tasks: Waiting, now_s: float = 0.0) -> None:
    for task in tasks:
        board.add(task, now_s)


def test_what_came_first_goes_first() -> None:
    board = a_board(a_view())
    add(board, a_task("late", rank_s=2.0), a_task("early", rank_s=1.0))
    assert got(board) == ["early"]


def test_only_what_a_worker_offers_is_planned_for_it() -> None:
    board = a_board(a_view(offers=frozenset({"checkpoint:a"})))
    add(board, a_task("b", kind=B))
    assert got(board) == []
    assert board.planned_at(("b", 1)) is None
    board.seen(a_view("other", held=frozenset({"b"})), 1.0)
    assert got(board, "other", now_s=1.0) == ["b"]


def test_a_task_goes_to_the_worker_that_finishes_it_first() -> None:
    board = a_board(a_view("slow", step_s=1.0), a_view("quick", step_s=0.1))
    add(board, a_task("1"))
    assert got(board, "slow") == []
    assert got(board, "quick") == ["1"]


def test_queued_work_counts_so_that_a_quick_worker_is_not_waited_for_in_vain() -> None:
    board = a_board(a_view("slow", step_s=0.3), a_view("quick", step_s=0.1))
    add(board, *(a_task(str(i), rank_s=i) for i in range(8)))
    assert len(got(board, "quick", limit=8)) + len(got(board, "slow", limit=8)) == 8
    assert board.post("slow").running


def test_a_checkpoint_that_is_elsewhere_is_not_fetched_for_a_task_that_can_wait() -> None:
    holder = a_view("holder", held=frozenset({"a"}))
    board = a_board(holder, a_view("empty", held=frozenset(), step_s=0.1), price=100.0)
    add(board, a_task("1"), a_task("2", rank_s=1.0))
    assert got(board, "empty") == []
    assert board.fetches("empty") == []
    assert got(board, "holder") == ["1"]


def test_a_backlog_that_is_worth_more_than_the_download_makes_one_more_worker_fetch() -> None:
    board = a_board(a_view("holder", held=frozenset({"a"}), step_s=1.0), a_view("empty", held=frozenset()), price=1.0)
    add(board, *(a_task(str(i), rank_s=i) for i in range(8)))
    assert [fetch.model for fetch in board.fetches("empty")] == ["a"]
    (claim,) = board.take_claims()
    assert (claim.worker, claim.fetch.model) == ("empty", "a")
    # The tasks stay where they are until it has come.
    assert got(board, "empty") == []


def test_a_fetch_that_another_gateway_has_done_already_is_dropped() -> None:
    board = a_board(a_view("here", held=frozenset()), a_view("there", held=frozenset(), link_bps=10e6))
    add(board, a_task("1"))
    (claim,) = board.take_claims()
    assert claim.worker == "here"
    board.refuse(claim, "there", 1.0)
    assert board.fetches("here") == []
    assert board.planned_at(("1", 1)).view.id == "there"


def test_a_small_model_is_fetched_where_the_checkpoint_lies() -> None:
    lora = kind_of("a", "l")
    board = a_board(a_view(held=frozenset({"a"})), a_view("empty", held=frozenset({"l"})))
    add(board, a_task("1", kind=lora))
    assert [fetch.model for fetch in board.fetches("w")] == ["l"]
    assert got(board) == []
    board.seen(a_view(held=frozenset({"a", "l"})), 20.0)
    assert got(board, now_s=20.0) == ["1"]


def test_a_worker_that_fetches_nothing_ahead_gets_the_task_at_once() -> None:
    board = a_board(a_view(held=frozenset(), takes_fetches=False))
    add(board, a_task("1"))
    assert got(board) == ["1"]


def test_a_fetch_that_does_not_come_is_given_up_and_the_task_tried_so_that_the_worker_says_why() -> None:
    board = a_board(a_view(held=frozenset({"a"})))
    add(board, a_task("1", kind=kind_of("a", "l")))
    assert got(board, now_s=30.0) == []
    assert got(board, now_s=1_000.0) == ["1"]


def test_a_task_whose_model_could_not_be_fetched_ahead_is_tried_at_once() -> None:
    board = a_board(a_view(held=frozenset({"a"})))
    add(board, a_task("1", kind=kind_of("a", "l")))
    assert got(board) == []
    board.seen(a_view(held=frozenset({"a"}), unfetched=frozenset({"l"})), 1.0)
    assert got(board, now_s=1.0) == ["1"]
    assert board.fetches("w") == []


def test_small_models_go_before_checkpoints_on_a_link() -> None:
    board = a_board(a_view(held=frozenset({"a"})))
    add(board, a_task("b", kind=B), a_task("l", kind=kind_of("a", "l")))
    assert [fetch.model for fetch in board.fetches("w")] == ["l", "b"]


def test_a_worker_has_only_so_many_models_on_their_way() -> None:
    board = a_board(a_view(held=frozenset({"a"})))
    add(board, *(a_task(str(i), kind=kind_of("a", f"l{i}")) for i in range(2 * FETCHES_LIMIT)))
    assert len(board.fetches("w")) == FETCHES_LIMIT


def test_a_day_of_fetching_ahead_is_bounded() -> None:
    board = a_board(
        a_view("holder", held=frozenset({"a"}), step_s=1.0), a_view("empty", held=frozenset()), day_bytes=GB // 2
    )
    add(board, *(a_task(str(i), rank_s=i) for i in range(20)))
    assert board.fetches("empty") == []


def a_fleet(count: int) -> list[WorkerView]:
    """Empty, with room; the later ones are slower."""
    return [
        a_view(str(i), held=frozenset(), disk_bytes=100 * GB, step_s=0.1 + 0.1 * i, link_bps=100e6)
        for i in range(count)
    ]


def unasked_of(board: Board) -> dict[str, str]:
    """What workers that ask are to fetch, and which."""
    for worker in board.workers:
        assert got(board, worker) == []
    return {fetch.model: worker for worker in board.workers for fetch in board.fetches(worker)}


def test_idle_workers_of_a_fleet_fetch_what_nobody_holds_once_and_the_slower_half_does_not() -> None:
    found = unasked_of(a_board(*a_fleet(UNASKED_WORKERS_MIN)))
    assert sorted(found) == ["a", "b"]
    assert all(int(worker) < UNASKED_WORKERS_MIN / 2 for worker in found.values())


def test_a_few_workers_fetch_nothing_unasked() -> None:
    assert unasked_of(a_board(*a_fleet(UNASKED_WORKERS_MIN - 1))) == {}


def test_nothing_is_fetched_unasked_where_that_is_turned_off_or_the_disk_has_no_room_for_it() -> None:
    fleet = a_fleet(UNASKED_WORKERS_MIN)
    assert unasked_of(a_board(*fleet, unasked_share=0.0)) == {}
    assert unasked_of(a_board(*(replace(view, disk_bytes=GB) for view in fleet))) == {}
    assert unasked_of(a_board(*(replace(view, disk_bytes=0) for view in fleet))) == {}
    assert unasked_of(a_board(*fleet, day_bytes=GB // 2)) == {}


def test_what_a_worker_could_not_fetch_unasked_it_is_not_told_to_fetch_again() -> None:
    fleet = a_fleet(UNASKED_WORKERS_MIN)
    board = a_board(*fleet)
    told = []
    for turn in range(6):
        assert got(board, "0", now_s=turn) == []
        told += [fetch.model for fetch in board.fetches("0")]
        board.seen(replace(fleet[0], unfetched=frozenset(told)), float(turn))
    assert sorted(told) == ["a", "b"]
    assert got(board, "0", now_s=FAILED_S + 10.0) == []
    assert board.fetches("0") != [], "perhaps it can by now"


def test_a_worker_that_could_not_fetch_a_checkpoint_is_not_the_next_to_hold_a_copy() -> None:
    failing = a_view("failing", held=frozenset(), step_s=0.01)
    board = a_board(a_view("holder", held=frozenset({"a"}), step_s=1.0), failing, price=1.0)
    add(board, *(a_task(str(i), rank_s=i) for i in range(8)))
    assert [fetch.model for fetch in board.fetches("failing")] == ["a"]
    add(board, a_task("late", rank_s=8.0), now_s=1.0)
    assert board.planned_at(("late", 1)) is board.post("failing")
    board.seen(replace(failing, unfetched=frozenset({"a"})), 2.0)
    assert board.planned_at(("late", 1)) is board.post("holder"), "who can do it without fetching anything"
    add(board, *(a_task(f"more{i}", rank_s=i) for i in range(8)), now_s=10.0)
    assert board.fetches("failing") == []


def test_a_checkpoint_that_many_hold_must_be_missed_more_to_be_fetched_once_more() -> None:
    def copies_after(holders: int) -> int:
        views = [a_view(f"h{i}", held=frozenset({"a"})) for i in range(holders)]
        board = a_board(*views, a_view("empty", held=frozenset(), step_s=0.01), absence=0.0)
        for i in range(40):
            add(board, a_task(str(i), rank_s=i), now_s=i * REST_S)
            assert len(got(board, f"h{i % holders}", now_s=i * REST_S)) <= 1
            board.ended((str(i), 1), i * REST_S)
            if board.fetches("empty"):
                return i
        return 40

    assert copies_after(1) < copies_after(12)


def test_a_worker_that_must_load_a_checkpoint_is_passed_over_for_one_that_has_it_ready() -> None:
    cold = a_view("cold", held=frozenset({"a"}), step_s=0.10)
    warm = a_view("warm", held=frozenset({"a"}), vram=frozenset({"a"}), step_s=0.15)
    board = a_board(cold, warm)
    add(board, a_task("1"))
    post = board.planned_at(("1", 1))
    assert post is not None
    assert post.view.id == "warm"


def test_tasks_of_a_checkpoint_are_planned_together_and_only_the_first_pays_for_loading() -> None:
    board = a_board(a_view(held=frozenset({"a"})))
    add(board, a_task("1"), a_task("2", rank_s=1.0))
    post = board.planned_at(("2", 1))
    assert post is not None
    assert post.wait_s(0.0) == pytest.approx(2 * 20 * 0.2 + load_s(post, "a"))


def test_of_two_alike_the_one_that_did_the_same_combination_before_has_its_patches_still() -> None:
    held = frozenset({"a", "l"})
    board = a_board(a_view("v", held=held, vram=frozenset({"a"})), a_view("w", held=held, vram=frozenset({"a"})))
    other, same = kind_of("a"), kind_of("a", "l")
    post = {name: board.post(name) for name in ("v", "w")}
    for name, kind in (("v", other), ("w", same)):
        task = a_task(name, kind=kind)
        board.started(name, task, 0.0)
        board.ended(task.key, 4.0)
    add(board, a_task("next", kind=same), now_s=5.0)
    assert board.planned_at(("next", 1)) is post["w"]
    assert got(board, "w", now_s=5.0) == ["next"]


def test_what_is_planned_in_between_costs_the_patches() -> None:
    board = a_board(a_view(held=frozenset({"a", "l"})))
    same = a_task("same", kind=kind_of("a", "l"))
    board.started("w", same, 0.0)
    post = board.post("w")
    assert post is not None
    again = replace(same, key=("again", 1))
    assert estimate(post, again, 1.0).patch_s == 0.0
    add(board, a_task("between"))
    assert estimate(post, again, 1.0).patch_s == PATCH_S
    assert estimate(post, again, 1.0, ahead_s=0.0).patch_s == 0.0
    best = best_of([post], again, 1.0)
    assert best is not None
    assert best.cost_s == pytest.approx(estimate(post, again, 1.0).cost_s)


def test_a_worker_keeps_to_the_checkpoint_on_its_device_until_another_has_waited_too_long() -> None:
    both = a_view(held=frozenset({"a", "b"}), vram=frozenset({"a"}))
    tasks = a_task("first", kind=B), a_task("second", rank_s=1.0)
    board = a_board(both)
    add(board, *tasks)
    assert got(board) == ["second"]
    board = a_board(both)
    add(board, *tasks)
    assert got(board, now_s=STICKY_LIMIT_S) == ["first"]


def test_a_batch_is_of_one_kind_and_in_order() -> None:
    board = a_board(a_view())
    wide = replace(A, width_px=512)
    add(board, a_task("1"), a_task("2", kind=wide, rank_s=1.0), a_task("3", rank_s=3.0), a_task("4", rank_s=2.0))
    assert got(board, limit=8) == ["1", "4", "3"]


def test_a_batch_leaves_their_share_to_workers_that_wait_idle() -> None:
    board = a_board(a_view("1"), a_view("2"), a_view("3"))
    add(board, *(a_task(str(i), rank_s=i) for i in range(6)))
    assert [len(got(board, worker, limit=8)) for worker in ("1", "2", "3")] == [2, 2, 2]


def test_a_task_that_must_run_alone_comes_alone() -> None:
    board = a_board(a_view())
    add(board, a_task("1", alone=True), a_task("2", rank_s=1.0))
    assert got(board, limit=8) == ["1"]
    board = a_board(a_view())
    add(board, a_task("1"), a_task("2", rank_s=1.0, alone=True), a_task("3", rank_s=2.0))
    assert got(board, limit=8) == ["1", "3"]


def test_a_node_that_failed_a_task_leaves_it_to_another_while_there_is_one() -> None:
    failed = a_task("1", failed_nodes=frozenset({"node-w"}))
    board = a_board(a_view(), a_view("other"))
    add(board, failed)
    assert got(board) == []
    board.gone("other", 1.0)
    assert got(board, now_s=1.0) == ["1"]


def test_what_was_planned_for_a_worker_that_is_gone_goes_elsewhere() -> None:
    board = a_board(a_view("1"), a_view("2", step_s=1.0))
    add(board, a_task("t"))
    assert board.planned_at(("t", 1)).view.id == "1"
    board.gone("1", 1.0)
    assert got(board, "2", now_s=1.0) == ["t"]


def test_what_is_late_elsewhere_is_taken_by_whoever_asks() -> None:
    board = a_board(a_view("quick"), a_view("slow", step_s=1.0))
    add(board, a_task("t"))
    assert got(board, "slow", now_s=1.0) == []
    assert got(board, "slow", now_s=60.0) == ["t"]


def test_a_worker_that_lost_its_checkpoint_loses_what_was_planned_for_it() -> None:
    board = a_board(a_view("1"), a_view("2", step_s=1.0))
    add(board, a_task("t"))
    board.seen(a_view("1", held=frozenset({"b"})), 1.0)
    assert board.planned_at(("t", 1)).view.id == "2"


def test_explaining_says_why_each_worker_is_not_the_one() -> None:
    lora = kind_of("a", "l")
    poor = a_view("poor", offers=frozenset({"checkpoint:a"}))
    board = a_board(
        a_view("best", held=frozenset({"a", "l"})),
        a_view("far", held=frozenset()),
        a_view("once", held=frozenset({"a", "l"})),
        poor,
    )
    task = a_task("t", kind=lora, failed_nodes=frozenset({"node-once"}))
    add(board, task)
    explained = explain(board, task, 0.0)
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


def test_explaining_calls_nobody_slower_who_would_be_sooner_by_now() -> None:
    board = a_board(a_view("early"))
    task = a_task("t")
    add(board, task)
    board.seen(a_view("early", step_s=9.0), 1.0)
    board.seen(a_view("late"), 1.0)
    verdicts = {each.worker: each.verdict for each in explain(board, task, 1.0).workers}
    assert verdicts == {"early": Verdict.PLANNED, "late": Verdict.SOONER}


def test_explaining_says_when_no_worker_has_all_of_it_together() -> None:
    board = a_board(a_view("1", offers=frozenset({"checkpoint:a"})), a_view("2", offers=frozenset({"lora:l"})))
    task = a_task("t", kind=kind_of("a", "l"))
    add(board, task)
    explained = explain(board, task, 0.0)
    assert explained.place is None
    assert explained.why == "no worker offers all that it needs; 1 comes nearest and lacks lora:l"


SMALL_IMAGE, LARGE_IMAGE = replace(A, amounts=(("pixels", 4_096),)), replace(A, amounts=(("pixels", 16_384),))


def a_mixed_fleet() -> Board:
    """One takes small images and is quick, one takes large ones, and one takes any but has too few layers."""
    return a_board(
        a_view("small", limits=(("pixels", 4_096),), step_s=0.01),
        a_view("large", limits=(("images", 1), ("pixels", 16_384))),
        a_view("odd", limits=(("text_encoder_layers:a", 10),), step_s=1.0),
    )


def test_in_a_fleet_of_unequal_workers_a_task_goes_to_one_that_takes_it() -> None:
    board = a_mixed_fleet()
    skipping = replace(LARGE_IMAGE, amounts=(("pixels", 20_000), ("text_encoder_layers:a", 11)))
    add(
        board,
        a_task("large", kind=LARGE_IMAGE),
        a_task("small", kind=SMALL_IMAGE, rank_s=1.0),
        a_task("nobody", kind=skipping, rank_s=2.0),
    )
    assert got(board, "small", limit=8) == ["small"]
    assert got(board, "large", limit=8) == ["large"]
    assert board.planned_at(("nobody", 1)) is None
    board.seen(a_view("new", limits=(("text_encoder_layers:a", 11),)), 1.0)
    assert got(board, "new", now_s=1.0) == ["nobody"]


def test_a_worker_whose_limits_fall_loses_what_it_takes_no_more() -> None:
    board = a_board(a_view("first"), a_view("second", step_s=1.0))
    add(board, a_task("t", kind=LARGE_IMAGE))
    assert board.planned_at(("t", 1)).view.id == "first"
    board.seen(a_view("first", limits=(("pixels", 4_096),)), 1.0)
    assert board.planned_at(("t", 1)).view.id == "second"
    board.seen(a_view("second", limits=(("pixels", 4_096),)), 2.0)
    assert board.planned_at(("t", 1)) is None
    board.seen(a_view("first"), 3.0)
    assert got(board, "first", now_s=3.0) == ["t"]


def test_large_images_at_the_head_of_a_line_hide_no_small_ones_from_a_worker_that_takes_only_those() -> None:
    board = a_board(a_view("large"))
    add(board, *(a_task(f"large{i}", kind=LARGE_IMAGE, rank_s=i) for i in range(20)))
    add(board, a_task("small", kind=SMALL_IMAGE, rank_s=100.0))
    assert board.planned_at(("small", 1)).view.id == "large"
    small = a_view("small", limits=(("pixels", 4_096),))
    board.seen(small, 1.0)
    board.asks("small", 1.0)
    assert got(board, "small", now_s=1.0) == ["small"]


def test_no_worker_fetches_a_checkpoint_for_images_that_it_does_not_take() -> None:
    board = a_board(
        a_view("small", held=frozenset(), limits=(("pixels", 4_096),), step_s=0.01), a_view("large", held=frozenset())
    )
    add(board, a_task("t", kind=LARGE_IMAGE))
    assert board.fetches("small") == []
    assert [fetch.model for fetch in board.fetches("large")] == ["a"]


def test_explaining_says_which_limits_are_too_low() -> None:
    board = a_mixed_fleet()
    task = a_task("t", kind=replace(kind_of("c"), amounts=(("pixels", 16_384), ("text_encoder_layers:a", 12))))
    add(board, task)
    explained = explain(board, task, 0.0)
    missing = {each.worker: each.missing for each in explained.workers}
    assert missing == {
        "small": ("checkpoint:c", "pixels: takes 4096, 16384 needed"),
        "large": ("checkpoint:c",),
        "odd": ("checkpoint:c", "text_encoder_layers:a: takes 10, 12 needed"),
    }
    why = {each.worker: each.why for each in explained.workers}["small"]
    assert why == "it does not offer checkpoint:c; its limits are too low (pixels: takes 4096, 16384 needed)"
    assert {each.verdict for each in explained.workers} == {Verdict.OFFERS_TOO_LITTLE}
    board.seen(a_view("small", offers=frozenset({"checkpoint:c"}), limits=(("pixels", 4_096),)), 1.0)
    board.gone("large", 1.0)
    board.gone("odd", 1.0)
    assert "small comes nearest and lacks pixels: takes 4096, 16384 needed" in explain(board, task, 1.0).why


def test_what_can_do_a_kind_is_known_of_so_many_kinds() -> None:
    board = a_board(a_view())
    for number in range(ABLE_LIMIT + 10):
        board.crowds.able(replace(A, amounts=(("pixels", number),)))
    assert len(board.crowds._able) == ABLE_LIMIT
    assert list(board.crowds.able(A)) == [board.crowds.like(board.post("w"))]


def test_of_many_groups_of_workers_some_are_looked_at_and_others_the_next_time() -> None:
    board = a_board(*(a_view(f"w{i}", limits=(("pixels", 10_000 + i),)) for i in range(30)))
    looks = [{post.view.id for post in board.crowds.some_able(A, 10)} for _ in range(3)]
    assert [len(look) for look in looks] == [10, 10, 10]
    assert len(set.union(*looks)) == 30
    assert len(list(board.crowds.some_able(replace(A, amounts=(("pixels", 10_025),)), 10))) == 5


def test_work_without_a_checkpoint_goes_to_whoever_is_free_first() -> None:
    canny = Kind(stage="preprocess", needs=frozenset({"annotator:canny"}))
    views = [a_view(name, stage="preprocess", offers=canny.needs, task_s=0.5) for name in ("1", "2")]
    board = a_board(*views)
    add(board, *(a_task(str(i), kind=canny, rank_s=i, steps=0) for i in range(4)))
    assert [len(got(board, view.id, limit=8)) for view in views] == [2, 2]
