"""How long an evaluation is expected to take, by family and size."""

from dataclasses import replace

import pytest

from services.gateway.app.capabilities import (
    CLASSES_LIMIT,
    DEVICES_LIMIT,
    STEP_MAX_S,
    STEP_MIN_S,
    USUAL_MOVED,
    CapabilityGroup,
    KeptCapabilities,
    WorkerViews,
)
from services.gateway.domain.workers import Capabilities, ReportedStepTime, Worker
from services.gateway.scheduler.explain import explain
from services.gateway.scheduler.pace import ABSURD_FACTOR, USUAL_SIZE_CLASS, USUAL_STEP_S, step_s
from services.gateway.scheduler.queue import TaskKind
from services.gateway.scheduler.schedule import Scheduler
from services.gateway.scheduler.workers import WorkerView
from tests.fakes.scheduler import A, a_task, a_view

SMALL, LARGE = 18, 22
KEPT = KeptCapabilities(capabilities=Capabilities(), time_s=0.0)
NOTHING = CapabilityGroup(
    digest="",
    kept=KEPT,
    offered=KEPT.capabilities,
    left_out=(),
    offers=frozenset(),
    limits=(),
    needs_by_id={},
    annotators={},
    sizes={},
)


@pytest.mark.parametrize(
    ("own", "usual", "expected_s"),
    [
        ({("sd1", 18): 0.2, ("sd1", 20): 5.0}, {("sd1", 18): 9.0}, 0.2),
        # The nearest class of the family, by pixels: on both sides alike, their mean.
        ({("sd1", 20): 0.8, ("sdxl", 18): 9.0}, {("sd1", 18): 9.0}, 0.2),
        ({("sd1", 16): 0.1, ("sd1", 20): 1.0, ("sd1", 22): 50.0}, {}, (0.4 + 0.25) / 2),
        # What is usual on the device: that class, else the nearest.
        ({("sdxl", 18): 9.0}, {("sd1", 18): 0.3, ("sd1", 20): 9.0}, 0.3),
        ({("sdxl", 18): 9.0}, {("sd1", 20): 1.0}, 0.25),
        # How fast it is with others.
        ({("sdxl", 20): 8.0}, {}, 2.0),
        ({}, {("sdxl", 18): 5.0}, USUAL_STEP_S),
        ({}, {}, USUAL_STEP_S),
    ],
)
def test_a_time_is_the_nearest_that_was_measured(own, usual, expected_s) -> None:
    assert step_s(own, usual, "sd1", SMALL) == pytest.approx(expected_s)


def test_without_any_measurement_a_time_goes_by_pixels() -> None:
    assert step_s({}, {}, "sd1", USUAL_SIZE_CLASS + 2) == pytest.approx(4 * USUAL_STEP_S)


def test_where_family_or_size_is_not_known_before_the_work_begins_the_others_count() -> None:
    own = {("sd1", 18): 0.2, ("sdxl", 18): 0.6, ("sdxl", 20): 4.0, ("sdxl", 22): 9.0}
    assert step_s(own, {}, "", 18) == pytest.approx(0.4)
    assert step_s(own, {}, "sdxl", 0) == 4.0
    assert step_s({}, {}, "", 0) == USUAL_STEP_S


def test_a_slow_report_of_large_images_leaves_the_estimate_of_small_ones_as_it_is() -> None:
    """One mean of all made it 20 times as long."""
    views, scheduler = WorkerViews(), Scheduler()
    worker = Worker(id="w", node="n", stage="diffusion", device="cuda:x", disk_models=frozenset({"a"}))
    small = ReportedStepTime(family="sd1", size_class=SMALL, mean_s=0.1)
    large = ReportedStepTime(family="sd1", size_class=LARGE, mean_s=40.0)
    kind = replace(A, family="sd1", width_px=512, height_px=512, size_class=SMALL)
    task = a_task("t", kind=kind)
    scheduler.add(task, 0.0)

    def estimated_s(*times: ReportedStepTime) -> float:
        scheduler.seen(views.of(replace(worker, step_times=times), replace(NOTHING, offers=A.needs), frozenset()), 0.0)
        (found,) = explain(scheduler, task, 0.0).workers
        assert found.estimate is not None
        return found.estimate.run_s

    before_s = estimated_s(small)
    assert before_s == pytest.approx(20 * 0.1 + 0.5)
    assert estimated_s(small, large) == before_s


def test_the_worker_that_is_quicker_at_a_size_gets_the_images_of_that_size() -> None:
    def kind(side_px: int, size_class: int) -> TaskKind:
        return replace(A, family="sd1", width_px=side_px, height_px=side_px, size_class=size_class)

    scheduler = Scheduler()
    for name, small_s, large_s in (("roomy", 0.2, 1.0), ("small", 0.1, 9.0)):
        scheduler.seen(a_view(name, step_times={("sd1", 18): small_s, ("sd1", 20): large_s}), 0.0)
        scheduler.asks(name, 0.0)
    scheduler.add(a_task("large", kind=kind(1024, 20)), 0.0)
    scheduler.add(a_task("small", kind=kind(512, 18)), 0.0)
    places = {name: scheduler.planned_at((name, 1)).view.id for name in ("large", "small")}
    assert places == {"large": "roomy", "small": "small"}


def test_work_that_is_planned_is_taken_off_as_it_was_put_on() -> None:
    scheduler = Scheduler()
    scheduler.seen(a_view(step_s=0.2), 0.0)
    scheduler.asks("w", 0.0)
    scheduler.add(a_task("1"), 0.0)
    scheduler.add(a_task("2"), 0.0)
    scheduler.seen(a_view(step_s=3.0), 0.0)
    worker = scheduler.worker("w")
    assert worker.wait_s(0.0) > 2 * 20 * 3.0
    scheduler.remove(("1", 1))
    assert worker.wait_s(0.0) < 2 * 20 * 3.0
    scheduler.remove(("2", 1))
    assert worker.wait_s(0.0) == 0.0


def views_of(*times: ReportedStepTime, views: WorkerViews, worker: str = "w", device: str = "cuda:x") -> WorkerView:
    said = Worker(id=worker, node="n", stage="diffusion", device=device, step_times=times)
    return views.of(said, NOTHING, frozenset())


def a_time(mean_s: float, *, size_class: int = SMALL, family: str = "sd1") -> ReportedStepTime:
    return ReportedStepTime(family=family, size_class=size_class, mean_s=mean_s)


def test_a_report_is_believed_a_few_times_off_what_is_usual_for_that_device_family_and_size() -> None:
    views = WorkerViews()
    for number in range(3):
        views_of(a_time(1.0), a_time(16.0, size_class=LARGE), views=views, worker=f"w{number}")
    believed = views_of(a_time(1e-9), a_time(500.0, size_class=LARGE), views=views, worker="liar").step_times
    assert believed == {("sd1", SMALL): 1.0 / ABSURD_FACTOR, ("sd1", LARGE): 16.0 * ABSURD_FACTOR}
    assert views_of(a_time(1e-9), views=views, device="other").step_times == {("sd1", SMALL): STEP_MIN_S}
    assert views_of(a_time(1e30, family="x"), views=views, device="other").step_times == {("x", SMALL): STEP_MAX_S}


def test_a_report_that_is_repeated_counts_once() -> None:
    views = WorkerViews()
    views_of(a_time(1.0), views=views, worker="honest")
    for _ in range(200):
        liar = views_of(a_time(600.0), views=views, worker="liar")
    assert liar.step_times[("sd1", SMALL)] == ABSURD_FACTOR
    assert liar.usual_times[("sd1", SMALL)] < ABSURD_FACTOR


def test_what_is_usual_is_for_workers_of_that_device_that_have_not_measured_it() -> None:
    views = WorkerViews()
    views_of(a_time(2.0), views=views, worker="old")
    assert views_of(views=views, worker="new").usual_times == {("sd1", SMALL): 2.0}
    assert views_of(views=views, worker="other", device="cpu").usual_times == {}


def test_a_mean_that_hardly_moves_makes_no_other_view() -> None:
    views = WorkerViews()
    before = views_of(a_time(2.0), views=views, worker="1").usual_times
    assert views_of(a_time(2.0 * (1 + USUAL_MOVED / 2)), views=views, worker="2").usual_times is before
    assert views_of(a_time(4.0), views=views, worker="3").usual_times is not before


def test_so_many_devices_and_classes_are_known() -> None:
    views = WorkerViews()
    for number in range(CLASSES_LIMIT + 50):
        view = views_of(a_time(1.0, family=f"f{number}"), views=views, worker=str(number))
    assert len(view.usual_times) == CLASSES_LIMIT
    for number in range(DEVICES_LIMIT + 50):
        views_of(a_time(1.0), views=views, worker="w", device=f"d{number}")
    assert len(views._devices) == DEVICES_LIMIT


def test_what_is_believed_of_a_worker_is_forgotten_with_it() -> None:
    views = WorkerViews()
    views_of(a_time(1.0), views=views)
    views.forget("w")
    assert not views._step_times
