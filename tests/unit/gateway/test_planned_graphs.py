"""Whatever a stage plans is checked before the job exists; outputs go from task to task of any stage."""

from dataclasses import dataclass
from typing import Any

import pytest

from fanlight.errors import InvalidField
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.submission import NewJob
from services.gateway.domain.job import PREPROCESS, Facts, Input, JobState, StageRequest
from services.gateway.domain.moderation import Policy
from services.gateway.domain.plan import JobPlan, NewTask
from services.gateway.wire import answers, requests, stages
from services.gateway.wire.stages import StageEntry, request_for
from tests.fakes.fleet import Fleet, photo

CHAIN = [[], [1], [2]]


@dataclass(frozen=True)
class Planned:
    """A request that becomes annotations of one another's outputs."""

    graph: list[list[int]]
    images: tuple[()] = ()
    tasks_limit: int = 3

    def under(self, policy: Policy) -> "Planned":
        return self

    def plan(self, kept: Any, draw: Any) -> JobPlan:
        message = preprocessor_pb2.AnnotateRequest(annotator="dream").SerializeToString()
        facts = Facts(annotator="dream", needs=frozenset({"annotator:dream"}))
        request = StageRequest(stage=PREPROCESS, field="annotation", message=message, facts=facts)
        tasks = [
            NewTask(request=0, inputs=tuple(Input(field="image", task=number) for number in of)) for of in self.graph
        ]
        return JobPlan(requests=(request,), tasks=tuple(tasks))


def planned(monkeypatch: pytest.MonkeyPatch, fleet: Fleet, graph: list[list[int]], makes: str = "image") -> NewJob:
    entry = StageEntry(
        name=PREPROCESS,
        request_type=preprocessor_pb2.AnnotateRequest,
        draft=lambda message, fleet: Planned(graph),
        field="annotation",
        makes=makes,
    )
    monkeypatch.setitem(stages.STAGES, PREPROCESS, entry)
    asked = preprocessor_pb2.AnnotateRequest(annotator="dream", image=photo())
    return requests.new_job(gateway_pb2.CreateJobRequest(annotation=asked), fleet.gateway.workers.offers)


@pytest.mark.parametrize(
    ("graph", "makes", "field"),
    [
        ([[1]], "image", "tasks[0].inputs"),
        ([[2], [1]], "image", "tasks[0].inputs"),
        ([[], [3]], "image", "tasks[1].inputs[0].task"),
        ([[], [1]], "text", "tasks[1].inputs[0].task"),
        ([[]] * 65, "image", "tasks"),
    ],
    ids=["itself", "a cycle", "a missing task", "an output of the wrong kind", "65 tasks"],
)
async def test_a_plan_that_cannot_be_done_makes_no_job(
    monkeypatch: pytest.MonkeyPatch, fleet: Fleet, graph: list[list[int]], makes: str, field: str
) -> None:
    new = planned(monkeypatch, fleet, graph, makes)
    with pytest.raises(InvalidField) as caught:
        await fleet.gateway.jobs.create(new)
    assert caught.value.field == field
    assert (await fleet.gateway.jobs.list(page_size=9, page_token="")).jobs == []


async def test_outputs_go_from_task_to_task_of_any_stage(monkeypatch: pytest.MonkeyPatch, fleet: Fleet) -> None:
    worker = fleet.worker(PREPROCESS)
    await worker.come()
    job = await fleet.gateway.jobs.create(planned(monkeypatch, fleet, CHAIN))
    for number in (1, 2, 3):
        (task,) = await worker.lease(limit=8)
        assert task.task.number == number
        request = preprocessor_pb2.AnnotateRequest.FromString(request_for(task.job, task.task).value)
        before = task.job.output_of(number - 1)
        assert request.image.blob.digest == (before.blob.digest if before else "")
        await worker.complete(task, image=b"made by %d" % number)
    done = await fleet.get(job)
    assert done.state is JobState.SUCCEEDED
    shown = answers.job(done)
    assert [[(each.field, each.task) for each in task.inputs] for task in shown.tasks] == [
        [],
        [("image", 1)],
        [("image", 2)],
    ]


async def test_a_graph_survives_a_restart_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Fleet()
    async with first.running():
        worker = first.worker(PREPROCESS)
        await worker.come()
        job = await first.gateway.jobs.create(planned(monkeypatch, first, CHAIN))
        (task,) = await worker.lease()
        await worker.complete(task)
    async with first.restarted().running() as again:
        assert await again.worker(PREPROCESS).work() == 2
        assert (await again.get(job)).state is JobState.SUCCEEDED
