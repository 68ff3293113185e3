"""One run of one policy over one workload, and what came of it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.fleet.world import GB, Clock, Job, Node, Options, Popularity


@dataclass(frozen=True, kw_only=True)
class Result:
    policy: str
    seed: int
    rate_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    gb_per_1000: float
    done: float
    latencies_s: Sequence[float] = ()


class Policy(Protocol):
    """Told what happens; makes nodes fetch and run."""

    name: str

    def arrive(self, job: Job) -> None: ...
    def finished(self, node: Node, job: Job) -> None: ...
    def came(self, node: Node, model: str) -> None: ...
    def died(self, node: Node, running: Job | None) -> None:
        """Noticed some seconds after it happened; the node may be back already."""
        ...

    def rose(self, node: Node) -> None: ...


class Simulation:
    def __init__(self, options: Options, seed: int) -> None:
        self.options = options
        self.clock = Clock()
        self._random = random.Random(seed)
        self._noise = random.Random(seed + 1)
        self.popularity = Popularity(options, random.Random(seed + 2))
        nodes = random.Random(seed + 3)
        self.nodes = [self._node(i, nodes) for i in range(options.nodes)]
        self.open: set[Job] = set()
        self._latencies_s: list[float] = []
        self._count = 0
        self._measured = 0
        self._warm_bytes = 0.0
        self.everywhere = False
        self.policy: Policy

    def _node(self, number: int, random_: random.Random) -> Node:
        low, high = self.options.link_factor
        return Node(
            name=f"n{number:05}",
            clock=self.clock,
            run_s=random_.uniform(*self.options.run_s),
            link_bps=self.options.link_bps * random_.uniform(low, high),
            options=self.options,
            came=lambda node, model: self.policy.came(node, model),
        )

    def run(self, policy: Policy, seed: int) -> Result:
        self.policy = policy
        options, churn = self.options, random.Random(seed + 4)
        for node in self.nodes:
            if churn.random() >= options.availability:
                node.die()
                self.clock.after(churn.expovariate(1 / options.repair_s), self._rise, node, churn)
            else:
                policy.rose(node)
                self._plan_death(node, churn)
        self.clock.after(self._random.expovariate(options.rate_per_s), self._arrive)
        self.clock.after(options.warm_up_s, self._warm)
        self.clock.run(options.duration_s + options.drain_s, self._is_over)
        return self._result(seed)

    def _is_over(self) -> bool:
        return self.clock.now_s > self.options.duration_s and not self.open

    def _warm(self) -> None:
        self._warm_bytes = sum(node.fetched_bytes for node in self.nodes)

    def _arrive(self) -> None:
        now_s = self.clock.now_s
        if now_s > self.options.duration_s:
            return
        self._count += 1
        job = Job(self._count, now_s, *self.popularity.draw(self._random))
        self._measured += now_s >= self.options.warm_up_s
        self.open.add(job)
        self.policy.arrive(job)
        self.clock.after(self._random.expovariate(self.options.rate_per_s), self._arrive)

    def start(self, node: Node, job: Job) -> None:
        """The node, which is idle and has all it needs, runs the job."""
        assert node.up
        assert node.running is None
        assert self.everywhere or node.holds(job)
        node.running = job
        took_s = node.work_s(job, self._noise.uniform(-1, 1), everywhere=self.everywhere)
        node.busy_s += took_s
        self.clock.after(took_s, self._end, node, job, node.life)

    def _end(self, node: Node, job: Job, life: int) -> None:
        if not node.up or node.life != life or node.running is not job:
            return
        node.running = None
        job.end_s = self.clock.now_s
        if job in self.open:
            self.open.remove(job)
            if job.arrival_s >= self.options.warm_up_s:
                self._latencies_s.append(job.end_s - job.arrival_s)
        self.policy.finished(node, job)

    def _plan_death(self, node: Node, churn: random.Random) -> None:
        share = self.options.availability
        if share < 1:
            self.clock.after(churn.expovariate((1 - share) / share / self.options.repair_s), self._die, node, churn)

    def _die(self, node: Node, churn: random.Random) -> None:
        running = node.running
        node.die()
        self.clock.after(self.options.notice_s, self.policy.died, node, running)
        self.clock.after(
            max(self.options.notice_s + 1, churn.expovariate(1 / self.options.repair_s)), self._rise, node, churn
        )

    def _rise(self, node: Node, churn: random.Random) -> None:
        node.rise(disk_lost=churn.random() < self.options.disk_lost)
        self.policy.rose(node)
        self._plan_death(node, churn)

    def _result(self, seed: int) -> Result:
        done = len(self._latencies_s) / max(1, self._measured)
        late_s = [self.clock.now_s - job.arrival_s for job in self.open if job.arrival_s >= self.options.warm_up_s]
        latencies_s = sorted(self._latencies_s + late_s) or [0.0]
        moved = sum(node.fetched_bytes for node in self.nodes) - self._warm_bytes

        def part(share: float) -> float:
            return latencies_s[min(len(latencies_s) - 1, int(share * len(latencies_s)))]

        return Result(
            policy=self.policy.name,
            seed=seed,
            rate_per_s=self.options.rate_per_s,
            p50_s=part(0.5),
            p95_s=part(0.95),
            p99_s=part(0.99),
            gb_per_1000=moved / GB / max(1, self._measured) * 1000,
            done=done,
            latencies_s=latencies_s,
        )
