"""Policies to compare with. They place a job when it comes, know all nodes, and pay nothing for asking.

Their nodes are as good as Fanlight's own workers: they fetch while they paint, small models first, and run the first
job that has all it needs; unless the options ask for plain ones.
"""

import random
from collections import deque

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
            node.needed = lambda node=node: {m for job in self.queues.get(node.name, ())[:8] for m in job.models}

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
        return min(nodes, key=lambda node: (self.load_s(node) + node.run_s, node.name))


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
    """A node that has (or is fetching) all of it, else one that has the checkpoint; a long queue spills over to the
    least loaded node of all.
    """

    name = "affinity with spill"
    spill_s = 30.0

    def pick(self, job: Job) -> Node:
        nodes = list(self.live.values())
        for models in (job.models, (job.checkpoint,)):
            holders = [node for node in nodes if self._has(node, models)]
            if holders:
                best = self.least_loaded(holders)
                if self.load_s(best) <= self.spill_s:
                    return best
        return self.least_loaded(nodes)

    def _has(self, node: Node, models: tuple[str, ...]) -> bool:
        return all(model in node.disk or model in node.fetching for model in models)
