"""Which task a worker gets."""

from typing import Any

from services.gateway.ordering.backlog import Backlog
from services.gateway.ordering.choice import STICKY_LIMIT_S, choose
from services.gateway.ordering.tasks import PRIORITY_STEP_S, Asker, Kind, Waiting

NEEDS = frozenset({"checkpoint:a"})
A = Kind(stage="diffusion", needs=NEEDS, checkpoint="a")
B = Kind(stage="diffusion", needs=frozenset({"checkpoint:b"}), checkpoint="b")
WIDE = Kind(stage="diffusion", needs=NEEDS, checkpoint="a", width_px=512, height_px=256)
OFFERS = frozenset({"checkpoint:a", "checkpoint:b"})


def task(name: str, *, kind: Kind = A, time_s: float = 0.0, **changes: Any) -> Waiting:
    values: dict[str, Any] = {"priority": 0, "create_time_s": time_s, "queue_time_s": time_s}
    return Waiting(key=(name, 1), kind=kind, **{**values, **changes})


def chosen(
    *tasks: Waiting,
    limit: int = 1,
    now_s: float = 10.0,
    able: frozenset[str] = frozenset({"n"}),
    rivals: int = 0,
    **asker: Any,
) -> list[str]:
    backlog = Backlog()
    for each in tasks:
        backlog.add(each)
    who = Asker(**{"node": "n", "stage": "diffusion", "offers": OFFERS, **asker})
    picked = choose(
        backlog, who, limit=limit, able_nodes=lambda kind: able, idle_rivals=lambda kind: rivals, now_s=now_s
    )
    return [each.key[0] for each in picked]


def test_what_came_first_goes_first() -> None:
    assert chosen(task("late", time_s=2.0), task("early", time_s=1.0)) == ["early"]


def test_a_higher_priority_goes_first() -> None:
    assert chosen(task("plain"), task("urgent", time_s=5.0, priority=1)) == ["urgent"]


def test_waiting_outweighs_priority_at_last() -> None:
    old = task("old", time_s=0.0)
    assert chosen(old, task("urgent", time_s=PRIORITY_STEP_S + 1, priority=1)) == ["old"]


def test_a_task_of_a_job_that_came_first_goes_first_even_if_it_was_blocked() -> None:
    assert chosen(task("begun", time_s=0.0, queue_time_s=9.0), task("new", time_s=5.0)) == ["begun"]


def test_only_what_the_worker_offers_is_chosen() -> None:
    assert chosen(task("b", kind=B), offers=NEEDS) == []
    assert chosen(task("a"), stage="preprocess") == []


def test_a_worker_keeps_to_the_checkpoint_it_holds() -> None:
    tasks = task("first", kind=B), task("second", time_s=5.0)
    assert chosen(*tasks, vram_models=frozenset({"a"})) == ["second"]
    assert chosen(*tasks, vram_models=frozenset({"b"})) == ["first"]
    assert chosen(*tasks, disk_models=frozenset({"a"})) == ["second"]


def test_nothing_waits_longer_than_a_limit_for_the_sake_of_a_held_checkpoint() -> None:
    tasks = task("first", kind=B), task("second", time_s=5.0)
    assert chosen(*tasks, vram_models=frozenset({"a"}), now_s=STICKY_LIMIT_S) == ["first"]


def test_a_batch_is_of_one_kind_and_in_order() -> None:
    tasks = task("1"), task("2", kind=WIDE), task("3", time_s=3.0), task("4", time_s=2.0)
    assert chosen(*tasks, limit=8) == ["1", "4", "3"]
    assert chosen(*tasks, limit=2) == ["1", "4"]


def test_a_batch_leaves_their_share_to_workers_that_wait_idle() -> None:
    tasks = [task(str(i)) for i in range(5)]
    assert len(chosen(*tasks, limit=8, rivals=1)) == 3
    assert len(chosen(*tasks, limit=2, rivals=1)) == 2
    assert len(chosen(*tasks, limit=8, rivals=100)) == 1


def test_a_task_that_must_run_alone_comes_alone() -> None:
    assert chosen(task("1", alone=True), task("2"), limit=8) == ["1"]
    assert chosen(task("1"), task("2", alone=True), task("3"), limit=8) == ["1", "3"]


def test_a_node_that_failed_a_task_leaves_it_to_another_live_one() -> None:
    failed = task("1", failed_nodes=frozenset({"n"}))
    assert chosen(failed, task("2"), able=frozenset({"n", "m"})) == ["2"]


def test_a_node_that_failed_a_task_gets_it_again_when_no_other_can_do_it() -> None:
    assert chosen(task("1", failed_nodes=frozenset({"n"}))) == ["1"]
    assert chosen(task("1", failed_nodes=frozenset({"n", "m"})), able=frozenset({"n", "m"})) == ["1"]


def test_a_removed_task_is_forgotten() -> None:
    backlog = Backlog()
    backlog.add(task("1"))
    backlog.add(task("1", time_s=4.0))
    assert len(backlog) == 1
    backlog.remove(("1", 1))
    backlog.remove(("1", 1))
    assert len(backlog) == 0
    assert list(backlog.by_kind()) == []
