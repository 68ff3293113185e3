"""Tasks that refer to one another's outputs: which graphs are refused, and that all others run to their end."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanlight.errors import FanlightError, InvalidField
from services.gateway.domain import machine
from services.gateway.domain.job import TASKS_LIMIT, Failure, Fault, Input, Job, JobState, Lease, Output, TaskState
from services.gateway.domain.machine import FAILURES_LIMIT
from services.gateway.domain.plan import IMAGE, JobPlan, NewTask, check, create
from tests.fakes.jobs import annotation, blob, generation

MAKES = {"preprocess": IMAGE, "diffusion": IMAGE, "tag": "text"}
CRASH = Failure(reason="NODE_FAULT", message="out of memory")
# By the number of a task: those that it takes something from.
Graph = Sequence[Sequence[int]]


def plan_of(graph: Graph, *, stages: Sequence[str] = ()) -> JobPlan:
    """Task 1 takes the outputs of `graph[0]`, and so on; 0 stands for a blob."""
    stages = stages or ["diffusion"] * len(graph)
    requests = {"diffusion": generation(), "preprocess": annotation()}
    requests["tag"] = replace(generation(), stage="tag")
    tasks = [
        NewTask(request=list(requests).index(stage), inputs=tuple(input_of(i, number) for i, number in enumerate(of)))
        for of, stage in zip(graph, stages, strict=True)
    ]
    return JobPlan(requests=tuple(requests.values()), tasks=tuple(tasks))


def input_of(index: int, number: int) -> Input:
    return Input(field=f"controls[{index}].image", task=number, blob=None if number else blob("photo"))


def job_of(graph: Graph) -> Job:
    return create(plan_of(graph), job_id="j", request_id="", priority=0, now_s=0.0)


def refusal(graph: Graph, *, stages: Sequence[str] = ()) -> FanlightError:
    with pytest.raises(InvalidField) as caught:
        check(plan_of(graph, stages=stages), MAKES)
    return caught.value


def states(job: Job) -> list[str]:
    return [task.state.value for task in job.tasks]


def done(job: Job, number: int) -> Job:
    token = f"t{number}-{job.revision}"
    job = machine.lease(job, number, Lease(token=token, worker="w", node="n", time_s=1.0), now_s=1.0)
    output = Output(blob=blob(f"out-{number}"), width_px=8, height_px=8)
    return machine.complete(job, number, token, outputs=[output], spans=[], now_s=2.0)


@pytest.mark.parametrize(
    ("graph", "field", "words"),
    [
        ([[1]], "tasks[0].inputs", "wait for one another: 1"),
        ([[], [1, 2]], "tasks[1].inputs", "wait for one another: 2"),
        ([[2], [1]], "tasks[0].inputs", "wait for one another: 1, 2"),
        ([[], [1, 4], [2], [3]], "tasks[1].inputs", "wait for one another: 2, 3, 4"),
        ([[], [1], [3], [3]], "tasks[2].inputs", "wait for one another: 3, 4"),
    ],
)
def test_tasks_that_wait_for_one_another_are_refused(graph: Graph, field: str, words: str) -> None:
    error = refusal(graph)
    assert (error.field, error.message) == (field, words)


@pytest.mark.parametrize("number", [3, -1, 65])
def test_an_input_of_an_unknown_task_is_refused(number: int) -> None:
    error = refusal([[], [0, number]])
    assert error.field == "tasks[1].inputs[1].task"
    assert "the tasks are 1 to 2" in error.message


def test_text_is_not_accepted_as_an_image() -> None:
    error = refusal([[], [1], [0, 1]], stages=["tag", "diffusion", "diffusion"])
    assert (error.field, error.message) == ("tasks[1].inputs[0].task", "is 1, which makes text; image is needed")


def test_an_unknown_stage_makes_nothing() -> None:
    with pytest.raises(InvalidField, match="makes nothing"):
        check(plan_of([[], [1]]), {})


def test_a_job_has_at_most_64_tasks() -> None:
    assert TASKS_LIMIT == 64
    check(plan_of([[]] * 64), MAKES)
    error = refusal([[]] * 65)
    assert (error.field, error.message) == ("tasks", "are 65; at most 64")


def test_a_diamond_joins_when_both_of_its_sides_are_made() -> None:
    diamond = [[0], [1], [1], [2, 3]]
    check(plan_of(diamond), MAKES)
    job = job_of(diamond)
    assert states(job) == ["queued", "blocked", "blocked", "blocked"]
    job = done(job, 1)
    assert states(job) == ["succeeded", "queued", "queued", "blocked"]
    job = done(job, 3)
    assert states(job) == ["succeeded", "queued", "succeeded", "blocked"]
    job = done(job, 2)
    assert states(job) == ["succeeded", "succeeded", "succeeded", "queued"]
    assert done(job, 4).state is JobState.SUCCEEDED


def test_a_task_of_blobs_waits_for_nothing() -> None:
    check(plan_of([[0, 0]]), MAKES)
    job = job_of([[0, 0]])
    assert states(job) == ["queued"]
    assert [each.blob for each in job.tasks[0].inputs] == [blob("photo")] * 2


def test_a_task_may_take_one_output_twice() -> None:
    job = done(job_of([[], [1, 1]]), 1)
    assert states(job) == ["succeeded", "queued"]


def test_a_task_may_take_the_output_of_one_that_comes_later() -> None:
    check(plan_of([[2], []]), MAKES)
    assert states(job_of([[2], []])) == ["blocked", "queued"]
    assert states(done(job_of([[2], []]), 2)) == ["queued", "succeeded"]


def test_cached_outputs_are_blobs_and_the_other_tasks_are_renumbered() -> None:
    made = {1: Output(blob=blob("edges"), width_px=8, height_px=8)}
    graph = [[0], [0], [1], [1, 2, 3]]
    job = create(plan_of(graph), job_id="j", request_id="", priority=0, now_s=0.0, made_before=made)
    assert states(job) == ["queued", "queued", "blocked"]
    assert [[each.task for each in task.inputs] for task in job.tasks] == [[0], [0], [0, 1, 2]]
    assert job.tasks[1].inputs[0].blob == job.tasks[2].inputs[0].blob == blob("edges")


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Without cycles, in any order of numbers."""
    count = draw(st.integers(1, 12))
    order = draw(st.permutations(range(1, count + 1)))
    takes: dict[int, list[int]] = {}
    for place, number in enumerate(order):
        takes[number] = draw(st.lists(st.sampled_from([0, *order[:place]]), max_size=4))
    return [takes[number] for number in range(1, count + 1)]


def hold(job: Job) -> None:
    """What must hold of every job at any time."""
    there = {task.number for task in job.tasks if task.state is TaskState.SUCCEEDED}
    for task in job.tasks:
        has_all = all(each.task in there for each in task.inputs if each.task)
        assert task.state is not TaskState.BLOCKED or not has_all, "what can be done is queued"
        assert task.state not in (TaskState.QUEUED, TaskState.LEASED, TaskState.SUCCEEDED) or has_all


@given(graphs(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_graph_without_cycles_runs_to_its_end_in_any_order(graph: Graph, data: st.DataObject) -> None:
    check(plan_of(graph), MAKES)
    job = job_of(graph)
    for _ in graph:
        hold(job)
        ready = [task.number for task in job.tasks if task.state is TaskState.QUEUED]
        assert ready, "a job that has not ended has something to do"
        job = done(job, data.draw(st.sampled_from(ready)))
    hold(job)
    assert job.state is JobState.SUCCEEDED


@given(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_graph_is_refused_where_and_only_where_it_cannot_be_done(graph: Graph) -> None:
    """By trying: whoever completes what is queued comes to the end, or does not."""
    can_be_read = all(number <= len(graph) for inputs in graph for number in inputs)
    if can_be_read:
        job = job_of(graph)
        while ready := [task.number for task in job.tasks if task.state is TaskState.QUEUED]:
            job = done(job, ready[0])
    if can_be_read and job.state is JobState.SUCCEEDED:
        check(plan_of(graph), MAKES)
    else:
        refusal(graph)


@given(graphs(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_redriven_graph_waits_for_what_it_takes_and_runs_to_its_end(graph: Graph, data: st.DataObject) -> None:
    job = job_of(graph)
    before = data.draw(st.integers(0, len(graph) - 1))
    for _ in range(before):
        ready = [task.number for task in job.tasks if task.state is TaskState.QUEUED]
        job = done(job, data.draw(st.sampled_from(ready)))
    unlucky = data.draw(st.sampled_from([task.number for task in job.tasks if task.state is TaskState.QUEUED]))
    for attempt in range(FAILURES_LIMIT):
        lease = Lease(token=str(attempt), worker="w", node="n", time_s=1.0)
        job = machine.lease(job, unlucky, lease, now_s=1.0)
        job = machine.fail(job, unlucky, str(attempt), fault=Fault.NODE, failure=CRASH, now_s=2.0)
    assert job.state is JobState.FAILED
    job = machine.redrive(job, now_s=3.0)
    assert sum(task.state is TaskState.SUCCEEDED for task in job.tasks) == before
    while not job.state.ended:
        hold(job)
        ready = [task.number for task in job.tasks if task.state is TaskState.QUEUED]
        job = done(job, data.draw(st.sampled_from(ready)))
    assert job.state is JobState.SUCCEEDED
