"""What a failed attempt counts against: a part that its task needs, a stage of its node, or nothing. Pure.

A worker's word is taken only for parts that its task uses. What is named is to blame and nothing else: neither the node
nor the checkpoint for a damaged LoRA, and nobody here for a source that is away.
"""

import re
from dataclasses import replace

from fanlight.errors import FailedPrecondition, NotFound, ResultRefused, TooLarge
from services.gateway.domain.job import Attempt, Facts, Failure, Job, Task
from services.gateway.domain.workers import ANNOTATOR, CHECKPOINT, CONTROLNET, EMBEDDING, LORA, VAE

SOURCE, DEVICE, STAGE = "source:", "device:", "stage:"
# Of models, whose needs a failure may name as the part that failed.
KINDS = (ANNOTATOR, CHECKPOINT, CONTROLNET, EMBEDDING, LORA, VAE)
# What a sound node reports that lacks something that one request needs, or whose result the gateway refused. The task
# is retried on another node; without a part, neither a circuit breaker nor the straggler detector counts it.
NOT_HERE = frozenset({NotFound.reason, FailedPrecondition.reason, TooLarge.reason, ResultRefused.reason})
# Of these, what says nothing about a part either.
_OF_ONE_REQUEST = frozenset({TooLarge.reason, ResultRefused.reason})
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
_DEVICE = re.compile(r"[!-~]{1,64}")


def believed(failure: Failure, facts: Facts, *, is_fetched: bool) -> Failure:
    """The failure, without a part that the task does not use.

    `is_fetched`: the worker had to fetch something for the task, so that a source may have failed.
    """
    part = failure.part
    if not part or _uses(part, facts) or (part.startswith(DEVICE) and _DEVICE.fullmatch(part.removeprefix(DEVICE))):
        return failure
    if is_fetched and part.startswith(SOURCE) and _HOST.fullmatch(part.removeprefix(SOURCE)):
        return failure
    return replace(failure, part="")


def _uses(part: str, facts: Facts) -> bool:
    return part.partition(":")[0] in KINDS and part in facts.parts


def main_need(job: Job, task: Task) -> str:
    """What an unnamed failure counts against: the checkpoint, the annotator, or for other stages the stage."""
    facts = job.request_of(task).facts
    if facts.checkpoint:
        return f"{CHECKPOINT}:{facts.checkpoint}"
    return f"{ANNOTATOR}:{facts.annotator}" if facts.annotator else stage_need(task.stage)


def stage_need(stage: str) -> str:
    """What every task of a stage needs, such as `stage:diffusion`."""
    return f"{STAGE}{stage}"


def blamed_need(job: Job, task: Task, failure: Failure) -> str:
    """The need whose circuit breaker at the node counts a failure of the node; empty where none does.

    `failure`: as `believed` returned it.
    """
    if failure.part.startswith(SOURCE) or failure.reason in _OF_ONE_REQUEST:
        return ""
    if failure.part.startswith(DEVICE):
        return stage_need(task.stage)
    if failure.part:
        return failure.part
    return "" if failure.reason in NOT_HERE else main_need(job, task)


def need_of_claim(job: Job, task: Task, failure: Failure) -> str:
    """The need that counts where a node's claim that the request is at fault turned out to be wrong."""
    return failure.part if _uses(failure.part, job.request_of(task).facts) else main_need(job, task)


def is_own_fault(failure: Failure | None) -> bool:
    """Whether the worker itself is to blame, so that the straggler detector counts it: no part, or the device."""
    if failure is None or failure.reason in NOT_HERE:
        return False
    return not failure.part or failure.part.startswith(DEVICE)


def is_first(job: Job, attempt: Attempt, need: str) -> bool:
    """Whether no other attempt of the job failed at the node for that need: many tasks of one job count once."""
    alike = (
        each
        for task in job.tasks
        for each in task.counted
        if each.node == attempt.node and each.failure is not None and not each.refused
        if blamed_need(job, task, each.failure) == need
    )
    return all(each is attempt for each in alike)


def disproved(job: Job, number: int) -> list[tuple[Attempt, str]]:
    """Claims that the request was at fault which the task's success disproves, with the needs that they count against.

    Without those of nodes whose claims another task of the job disproved already.
    """
    task = job.tasks[number - 1]
    assert task.lease is not None
    others = [each for each in job.tasks if each.outputs and each.number != number]
    known = {each.node for other in others for each in other.refusals}
    claims = {each.node: each for each in task.refusals if each.node not in known | {task.lease.node}}
    return [(each, need_of_claim(job, task, each.failure)) for each in claims.values() if each.failure is not None]
