"""Who joins the batch, and who waits for the next one."""

import pytest

from services.diffusion.engine.batching import BatchKey, BatchQueue, batch_key


def key(model: str) -> BatchKey:
    return BatchKey(model=model, width_px=64, height_px=64, controlnets=(), is_guided=True)


A, B = key("a"), key("b")


@pytest.fixture
def turns() -> BatchQueue[str]:
    return BatchQueue(rows_limit=3, hold_limit_s=10.0)


def test_the_first_and_all_that_fit_it_start_together(turns):
    for name, its_key in (("a1", A), ("b1", B), ("a2", A)):
        turns.add(its_key, name)
    assert turns.take(now_s=0, running=0) == ["a1", "a2"]
    assert turns.take(now_s=1, running=2) == []
    assert turns.take(now_s=2, running=0) == ["b1"]


def test_one_that_fits_joins_the_running_batch_up_to_its_limit(turns):
    turns.add(A, "a1")
    turns.take(now_s=0, running=0)
    for name in ("a2", "a3", "a4"):
        turns.add(A, name)
    assert turns.take(now_s=1, running=1) == ["a2", "a3"]
    assert turns.take(now_s=2, running=3) == []
    assert turns.take(now_s=3, running=2) == ["a4"]


def test_a_batch_that_held_the_device_long_takes_no_more_while_another_waits(turns):
    turns.add(A, "a1")
    turns.take(now_s=0, running=0)
    turns.add(A, "a2")
    turns.add(B, "b1")
    assert turns.take(now_s=9.9, running=1) == ["a2"]
    turns.add(A, "a3")
    assert turns.take(now_s=10, running=2) == []
    assert turns.take(now_s=11, running=0) == ["b1"]


def test_a_long_batch_goes_on_taking_where_nobody_else_waits(turns):
    turns.add(A, "a1")
    turns.take(now_s=0, running=0)
    turns.add(A, "a2")
    assert turns.take(now_s=1000, running=1) == ["a2"]


def test_one_who_gave_up_gets_no_turn(turns):
    turns.add(A, "a1")
    turns.add(A, "a2")
    turns.remove("a1")
    turns.remove("stranger")
    assert turns.take(now_s=0, running=0) == ["a2"]
    assert len(turns) == 0


def test_only_what_changes_the_batchs_shape_parts_images(asked, control):
    one = batch_key(asked(), number=1)
    assert one == batch_key(asked(seed=8, steps=9, scheduler="euler", prompt="dog", guidance_scale=2), number=2)
    others = [
        asked(width_px=32),
        asked(guidance_scale=1.0),
        asked(controls=(control("canny"),)),
        asked(controls=(control("depth"),)),
        asked(alone=True),
    ]
    assert len({one, *(batch_key(other, number=3) for other in others)}) == 6
    assert batch_key(asked(alone=True), number=1) != batch_key(asked(alone=True), number=2)


def test_those_who_found_no_room_wait_for_the_batchs_end_where_they_stood(turns):
    for name, its_key in (("a1", A), ("b1", B), ("a2", A), ("a3", A)):
        turns.add(its_key, name)
    assert turns.take(now_s=0, running=0) == ["a1", "a2", "a3"]
    turns.put_back(["a2", "a3"])
    turns.add(A, "a4")
    assert turns.take(now_s=1, running=1) == []
    assert turns.take(now_s=2, running=0) == ["b1"]
    assert turns.take(now_s=3, running=0) == ["a2", "a3", "a4"]


def test_one_that_counts_for_several_rows_takes_their_room(turns):
    for name, rows in (("a1", 1), ("a2", 3), ("a3", 1)):
        turns.add(A, name, rows=rows)
    assert turns.take(now_s=0, running=0) == ["a1"]
    assert turns.take(now_s=1, running=1) == []
    assert turns.take(now_s=2, running=0) == ["a2"]
    assert turns.take(now_s=3, running=0) == ["a3"]


def test_one_that_counts_for_more_than_all_rows_is_a_batch_of_its_own(turns):
    for name, rows in (("a1", 9), ("a2", 1)):
        turns.add(A, name, rows=rows)
    assert turns.take(now_s=0, running=0) == ["a1"]
    assert turns.take(now_s=1, running=9) == []
    assert turns.take(now_s=2, running=0) == ["a2"]
