"""Why a task waits and why each worker was passed over, by the sums that plan it. Pure, and called rarely."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.gateway.scheduler.estimate import Estimate, estimate
from services.gateway.scheduler.queue import Amounts, TaskKind, WaitingTask, exceeded
from services.gateway.scheduler.schedule import Scheduler
from services.gateway.scheduler.workers import WorkerState

# How many names a sentence lists.
NAMES = 3


class Verdict(StrEnum):
    PLANNED = "planned"
    SLOWER = "slower"
    # It came, or became faster, after the task was planned.
    SOONER = "sooner"
    OFFERS_TOO_LITTLE = "offers_too_little"
    FAILED_IT = "failed_it"
    # Its circuit breaker for something that the task needs is open, its source is away, or it is set aside.
    AVOIDED = "avoided"
    DRAINING = "draining"
    AWAY = "away"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A worker and what it would need for the task; `estimate` is None if it cannot do it."""

    worker: str
    node: str
    verdict: Verdict
    why: str
    estimate: Estimate | None = None
    # Needs that it does not offer, and limits that are too low, in words.
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a task is planned, and what it needs there."""

    worker: str
    node: str
    link_bps: float
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    # In a sentence.
    why: str
    place: Place | None
    # Its tenant's, of its checkpoint or of its kind of work.
    tasks_ahead: int
    workers: Sequence[PassedOver]


def place_of(scheduler: Scheduler, task: WaitingTask, now_s: float) -> Place | None:
    """Of a queued task; None if no worker can do it."""
    worker = scheduler.planned_at(task.key)
    if worker is None:
        return None
    needed = estimate(worker, task, now_s, ahead_s=worker.ahead_s(task, now_s))
    return Place(worker=worker.view.id, node=worker.view.node, link_bps=worker.view.link_bps, estimate=needed)


def explain(scheduler: Scheduler, task: WaitingTask, now_s: float) -> Explanation:
    """Of a queued task. Linear in the workers."""
    place = place_of(scheduler, task, now_s)
    others = [_passed_over(worker, task, place, now_s) for worker in scheduler.workers_of(task.kind.stage)]
    others.sort(key=lambda each: (each.estimate.finish_s if each.estimate else float("inf"), each.worker))
    tasks_ahead = scheduler.queues.position(task)
    return Explanation(why=_why(place, others), place=place, tasks_ahead=tasks_ahead, workers=others)


def missing_of(offers: frozenset[str], limits: Amounts, kind: TaskKind) -> tuple[list[str], list[str]]:
    """What a worker lacks for tasks of the kind: needs that it does not offer, and limits that are too low."""
    too_low = [f"{name}: takes {limit}, {amount} needed" for name, limit, amount in exceeded(limits, kind.amounts)]
    return sorted(kind.needs - offers), too_low


def _passed_over(worker: WorkerState, task: WaitingTask, place: Place | None, now_s: float) -> PassedOver:
    view = worker.view
    unoffered, too_low = missing_of(view.offers, view.limits, task.kind)
    missing = (*unoffered, *too_low)
    needed: Estimate | None = None
    if missing:
        verdict, why = Verdict.OFFERS_TOO_LITTLE, _cannot(unoffered, too_low)
    elif place is not None and place.worker == view.id:
        verdict, why, needed = Verdict.PLANNED, "the plan has it finish the task first", place.estimate
    else:
        needed = estimate(worker, task, now_s)
        verdict, why = Verdict.SLOWER, f"it would finish in {needed.finish_s:.1f} s: {_costs(needed)}"
        if place is not None and needed.finish_s < place.estimate.finish_s:
            verdict, why = Verdict.SOONER, f"{why}; it gets the task if that still holds when it asks for work"
        if view.avoids_kind(task.kind):
            verdict, why = Verdict.AVOIDED, "such tasks fail there, and go to other workers first"
        if view.node in task.failed_nodes:
            verdict, why = Verdict.FAILED_IT, "its node failed this task before"
    return PassedOver(worker=view.id, node=view.node, verdict=verdict, why=why, estimate=needed, missing=missing)


def _why(place: Place | None, others: Sequence[PassedOver]) -> str:
    if place is not None:
        return f"{place.worker} should begin it in {place.estimate.start_s:.1f} s: {_costs(place.estimate)}"
    if not others:
        return "no worker of its stage is here"
    able = [each for each in others if not each.missing]
    if not able:
        nearest = min(others, key=lambda each: (len(each.missing), each.worker))
        return (
            f"no worker offers all that it needs; {nearest.worker} comes nearest and lacks {name_list(nearest.missing)}"
        )
    if all(each.verdict is Verdict.FAILED_IT for each in able):
        return "every worker that could do it has failed it once; one of them will retry it"
    if all(each.verdict in (Verdict.FAILED_IT, Verdict.AVOIDED) for each in able):
        return "every worker that could do it has failed it or such tasks; one of them will try it"
    return "a worker is being chosen"


def _cannot(unoffered: Sequence[str], too_low: Sequence[str]) -> str:
    reasons = [f"it does not offer {name_list(unoffered)}"] if unoffered else []
    reasons += [f"its limits are too low ({name_list(too_low)})"] if too_low else []
    return "; ".join(reasons)


def _costs(needed: Estimate) -> str:
    """Where its time goes, the waiting part first."""
    parts = []
    if needed.slot_s >= 0.05:
        parts.append(f"{needed.slot_s:.1f} s of other work first")
    if needed.fetch_s >= 0.05:
        parts.append(f"{needed.fetch_s:.1f} s fetching {needed.fetch_bytes / 1e6:.0f} MB")
    parts.append(f"{needed.load_s + needed.patch_s:.1f} s loading and {needed.run_s:.1f} s of work")
    return ", ".join(parts)


def name_list(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more
