"""What a decision costs: placing a task, and a worker's asking, at 100 and 1,000 workers with 10,000 tasks waiting.

Beside each time the floor: a plain sum over as many workers as hold the checkpoint, in the same run. CPU time in
microseconds, and ratios. Run: `python -m benchmarks.ordering [--rounds 2000]`.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.figures import RATIO, Report, arguments
from services.gateway.scheduler.pace import USUAL_SIZE_CLASS
from services.gateway.scheduler.queue import TaskKind, WaitingTask
from services.gateway.scheduler.schedule import Scheduler
from services.gateway.scheduler.workers import WorkerView

CHECKPOINTS, LORAS, HELD, WAITING = 400, 2_000, 20, 10_000
SIZES = {f"c{i}": 1_720_000_000 for i in range(CHECKPOINTS)} | {f"l{i}": 150_000_000 for i in range(LORAS)}
OFFERS = frozenset(f"{'checkpoint' if name[0] == 'c' else 'lora'}:{name}" for name in SIZES)


def zipf(random_: random.Random, count: int) -> int:
    return min(count - 1, int(count ** random_.random()) - 1)


def a_worker(number: int, random_: random.Random) -> WorkerView:
    held = {f"c{zipf(random_, CHECKPOINTS)}" for _ in range(HELD)} | {f"l{zipf(random_, LORAS)}" for _ in range(100)}
    return WorkerView(
        id=f"w{number:05}",
        node=f"n{number:05}",
        stage="diffusion",
        offers=OFFERS,
        held=frozenset(held),
        sizes=SIZES,
        link_bps=random_.uniform(50e6, 150e6),
        step_times={("", USUAL_SIZE_CLASS): random_.uniform(0.15, 0.6)},
        takes_fetches=True,
    )


def a_task(number: int, random_: random.Random) -> WaitingTask:
    checkpoint, lora = f"c{zipf(random_, CHECKPOINTS)}", f"l{zipf(random_, LORAS)}"
    kind = TaskKind(
        stage="diffusion",
        needs=frozenset([f"checkpoint:{checkpoint}", f"lora:{lora}"]),
        checkpoint=checkpoint,
        models=frozenset([checkpoint, lora]),
        loras=((lora, 1.0),),
    )
    return WaitingTask(key=(f"{number:08}", 1), kind=kind, rank_s=float(number), queue_time_s=0.0, steps=20)


def filled(workers: int, waiting: int, random_: random.Random) -> Scheduler:
    scheduler = Scheduler()
    for i in range(workers):
        view = a_worker(i, random_)
        scheduler.seen(view, 0.0)
        scheduler.asks(view.id, 0.0)
    for i in range(waiting):
        scheduler.add(a_task(i, random_), i * 0.001)
    return scheduler


def times_us(do: Callable[[int], object], rounds: int) -> list[float]:
    found = []
    for i in range(rounds):
        began = time.thread_time_ns()
        do(i)
        found.append((time.thread_time_ns() - began) / 1e3)
    return found


def measure(count: int, rounds: int, waiting: int, goal_us: float, report: Report) -> None:
    random_ = random.Random(count)
    scheduler = filled(count, waiting, random_)
    tasks = [a_task(waiting + i, random_) for i in range(rounds)]
    workers = list(scheduler.index.workers.values())
    now_s = 20.0

    def place(i: int) -> None:
        scheduler.add(tasks[i], now_s)

    def take(i: int) -> None:
        # What a worker that has done its task does; the task goes back so that as many wait for the next.
        for task in scheduler.choose(workers[i % count].view.id, 1, now_s):
            taken.append(task)

    def floor(i: int) -> float:
        held = scheduler.index.holders(tasks[i].kind.stage, tasks[i].kind.checkpoint)
        return min(
            (worker.wait_s(now_s) + 20 * worker.step_s_of(("", USUAL_SIZE_CLASS)) for worker in held), default=0.0
        )

    taken: list[WaitingTask] = []
    placed, floors = times_us(place, rounds), times_us(floor, rounds)
    for task in tasks:
        scheduler.remove(task.key)
    asked = times_us(take, rounds)
    base = statistics.mean(floors)
    place_name, ask_name = f"{count:,} workers, place a task that comes", f"{count:,} workers, answer one that asks"
    for name, found in ((place_name, placed), (ask_name, asked)):
        found.sort()
        report.add(name, found[len(found) // 2], "us", column="p50")
        report.add(name, found[len(found) * 99 // 100], "us", column="p99", goal=goal_us)
        report.add(name, statistics.mean(found) / base, RATIO, column="mean over a look at all holders")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2_000)
    asked = parser.parse_args(argv)
    rounds, waiting = (20, 100) if asked.smoke else (asked.rounds, WAITING)
    report = Report()
    for workers, goal_us in ((100, 200.0),) if asked.smoke else ((100, 200.0), (1_000, 2_000.0)):
        measure(workers, rounds, waiting, goal_us, report)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
