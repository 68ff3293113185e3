"""What the liars of the chaos run achieved: false control images, and when they were left out.

By the number of a worker, how it lies. A liar of these kinds is proven wrong: by the gateway's own look at its results
(`garbage`), by nodes that do what it calls impossible (`nonsense`), or by two nodes that agree on another control image
(`forges`). The other two only cost time.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.chaos_issuer import NAME
from benchmarks.figures import Report
from fanlight.client import AsyncClient
from fanlight.errors import FanlightError
from fanlight.gateway.v1.gateway_pb2 import Job, Task
from fanlight.nodes.v1.nodes_pb2 import Node

LIARS = {1: "garbage", 2: "nonsense", 3: "claims", 4: "vanishes", 6: "forges"}
PROVEN = ("garbage", "nonsense", "forges")
# So many that a run of minutes has some of them checked.
CHECKED_SHARE = 0.1
LOOK_EVERY_S = 1.0


def kind_of(subject: str) -> str:
    """How the worker of that name lies; empty for an honest one."""
    return LIARS.get(int(subject.rpartition("-")[2]), "")


@dataclass
class LeftOut:
    """By node id: when it was seen to be left out first, in seconds since 1970, and why."""

    nodes: dict[str, Node] = field(default_factory=dict)
    times_s: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    async def watch(self, client: AsyncClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(FanlightError):
                await self.look(client)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await stop.wait()

    async def look(self, client: AsyncClient) -> None:
        nodes, workers = await client.nodes.list(), await client.list_workers()
        self.nodes = {each.id: each for each in nodes if each.proof == NAME}
        for node in nodes:
            if node.state == Node.STATE_REVOKED:
                self._note(node.id, node.reason)
        for status in workers:
            if status.avoided:
                self._note(status.worker.node, status.avoided[0].why)

    def _note(self, node_id: str, why: str) -> None:
        self.times_s.setdefault(node_id, time.time())
        self.reasons.setdefault(node_id, why)

    def of_kind(self, kind: str) -> str:
        """The id of the node that lies so; empty for none."""
        return next((each.id for each in self.nodes.values() if kind_of(each.subject) == kind), "")


def judge_liars(
    jobs: Iterable[Job], truths: Mapping[str, str], left_out: LeftOut, report: Report, row: str, *, annotating: int
) -> None:
    """`truths`: by job, the digest of its photo's control image. `annotating`: how many workers preprocess."""
    jobs = list(jobs)
    made = [(job, each.blob.digest) for job in jobs for each in job.control_images if each.blob.digest]
    false = sum(digest != truths[job.name] for job, digest in made)
    forger = left_out.of_kind("forges")
    since_s = left_out.times_s.get(forger, float("inf"))
    late = [task for job in jobs for task in job.tasks if _is_of(task, forger) and _leased_s(task) > since_s]
    caught = [kind for kind in PROVEN if left_out.of_kind(kind) in left_out.reasons]
    report.add(row, len(made), "", column="control images", goal=1, at_least=True)
    report.add(row, false, "", column="false control images")
    # What the forger would have made without a check.
    part = len(made) / annotating
    report.add(row, false / max(1.0, part), "ratio", column="of the forger's even part", goal=1 - CHECKED_SHARE)
    report.add(row, len(caught), "", column="liars left out of 3 proven", goal=len(PROVEN), at_least=True)
    report.add(row, len(late), "", column="tasks of the forger afterwards", goal=0)
    for node_id, why in left_out.reasons.items():
        subject = left_out.nodes[node_id].subject if node_id in left_out.nodes else node_id
        print(f"{subject} ({kind_of(subject) or 'honest'}) was left out: {why}")


def _is_of(task: Task, node_id: str) -> bool:
    return task.node == node_id and task.state == Task.STATE_SUCCEEDED


def _leased_s(task: Task) -> float:
    return task.lease_time.seconds + task.lease_time.nanos / 1e9
