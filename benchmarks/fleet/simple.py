"""Policies to compare with. They place a job when it comes, know all nodes, and pay nothing for asking.

Their nodes are as good as Fanlight's own workers: they fetch while they generate, small models first, and run the first
job that has all it needs. Plain ones, which the options ask for, do jobs in the order in which they came, and downloads
too, but still fetch while they generate.
"""

import random
from collections import deque
from functools import partial

from benchmarks.fleet.run import Simulation
from benchmarks.fleet.world import Job, Node


class Pushed:
    """What all of them share: a queue at each node."""

    name = ""

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self.simulation = simulation
        self.random = random.Random(seed + 5)
        self.queues: dict[str, list[Job]] = {}
        self.live: dict[str, Node] = {}
        self._homeless: deque[Job] = deque()
        for node in simulation.nodes:
            node.needed = partial(self._needed, node)

    def _needed(self, node: Node) -> set[str]:
        """Models of the jobs that it runs next."""
        return {model for job in self.queues.get(node.name, [])[:8] for model in job.models}

    def pick(self, job: Job) -> Node:
        raise NotImplementedError

    def arrive(self, job: Job) -> None:
        if not self.live:
            self._homeless.append(job)
            return
        node = self.pick(job)
        self.queues[node.name].append(job)
        if node.up:
            self._fetch(node, job)
            self._next(node)

    def _fetch(self, node: Node, job: Job) -> None:
        if not self.simulation.everywhere:
            for model in job.models:
                node.fetch(model)

    def _next(self, node: Node) -> None:
        if not node.up or node.running is not None:
            return
        queue = self.queues[node.name]
        for job in queue[:1] if self.simulation.options.plain_workers else queue:
            if self.simulation.everywhere or node.holds(job):
                queue.remove(job)
                self.simulation.start(node, job)
                return
        for job in queue[:4]:
            # What was evicted meanwhile.
            self._fetch(node, job)

    def finished(self, node: Node, job: Job) -> None:
        self._next(node)

    def came(self, node: Node, model: str) -> None:
        self._next(node)

    def died(self, node: Node, running: Job | None) -> None:
        self.live.pop(node.name, None)
        lost = [*([running] if running else []), *self.queues.pop(node.name, [])]
        for job in lost:
            if job in self.simulation.open:
                self.arrive(job)

    def rose(self, node: Node) -> None:
        self.live[node.name] = node
        self.queues[node.name] = []
        while self._homeless:
            self.arrive(self._homeless.popleft())

    def load_s(self, node: Node) -> float:
        """Of what waits and runs there."""
        return (len(self.queues[node.name]) + (node.running is not None)) * node.run_s

    def least_loaded(self, nodes: list[Node]) -> Node:
        queues, best, best_s = self.queues, None, float("inf")
        for node in nodes:
            finish_s = (len(queues[node.name]) + (node.running is not None) + 1) * node.run_s
            if finish_s < best_s or (finish_s == best_s and best and node.name < best.name):
                best, best_s = node, finish_s
        assert best is not None
        return best


class Random(Pushed):
    name = "random"

    def pick(self, job: Job) -> Node:
        return self.random.choice(list(self.live.values()))


class LeastLoaded(Pushed):
    """The node that would finish first, were everything everywhere."""

    name = "least loaded"

    def pick(self, job: Job) -> Node:
        return self.least_loaded(list(self.live.values()))


class Oracle(LeastLoaded):
    """The same where everything really is everywhere, in VRAM."""

    name = "oracle"

    def __init__(self, simulation: Simulation, seed: int) -> None:
        super().__init__(simulation, seed)
        simulation.everywhere = True


class AffinityWithSpill(Pushed):
    """The least loaded node that has (or is fetching) the checkpoint; where more than `spill_s` of work waits at each
    of them, the least loaded node of all. `with_loras`: rather one that has the LoRA too.
    """

    name = "affinity with spill"

    def __init__(self, simulation: Simulation, seed: int, spill_s: float, *, with_loras: bool = False) -> None:
        super().__init__(simulation, seed)
        self.spill_s = spill_s
        self.with_loras = with_loras

    def pick(self, job: Job) -> Node:
        nodes = list(self.live.values())
        holders = [node for node in nodes if self._has(node, job.checkpoint)]
        complete = [node for node in holders if self._has(node, job.lora)] if job.lora and self.with_loras else []
        for able in (complete, holders):
            if able:
                best = self.least_loaded(able)
                if self.load_s(best) <= self.spill_s:
                    return best
        return self.least_loaded(nodes)

    def _has(self, node: Node, model: str) -> bool:
        return model in node.disk or model in node.fetching
