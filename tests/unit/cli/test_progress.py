"""The bar for a job that is waited for."""

import io

import pytest
from rich.console import Console

from fanlight.cli.reports import JobBar
from fanlight.gateway.v1.gateway_pb2 import Job, JobEvent, Task, TaskProgress


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def job(*states: "Task.State.ValueType") -> JobEvent:
    tasks = [Task(number=n + 1, stage="diffusion", state=state) for n, state in enumerate(states)]
    return JobEvent(job=Job(name="jobs/a", state=Job.STATE_RUNNING, tasks=tasks))


def at(task: int, step: int, steps: int) -> JobEvent:
    return JobEvent(progress=TaskProgress(task=task, step=step, steps=steps))


def shown(console: Console, *events: JobEvent) -> str:
    with JobBar(console) as bar:
        for event in events:
            bar.on_event(event)
    return console.file.getvalue()


def test_a_step_is_a_part_of_its_task(terminal):
    text = shown(terminal, job(Task.STATE_LEASED, Task.STATE_QUEUED), at(1, 5, 10))

    assert "diffusion 0/2" in text
    assert " 25%" in text


def test_an_ended_task_counts_whole_whatever_its_last_step_was(terminal):
    text = shown(terminal, job(Task.STATE_LEASED), at(1, 5, 10), job(Task.STATE_SUCCEEDED))

    assert "100%" in text


def test_nothing_is_shown_where_there_is_no_terminal():
    assert shown(Console(file=io.StringIO()), job(Task.STATE_LEASED), at(1, 5, 10)) == ""


def test_a_reference_neither_marks_up_nor_controls_the_terminal(terminal):
    evil = JobEvent(progress=TaskProgress(task=1))
    evil.progress.fetch.reference = "hf:[/red]\x1b[2J\u202e"
    text = shown(terminal, job(Task.STATE_LEASED), evil)

    assert r"[/red]\x1b[2J" in text
    assert "\x1b[2J" not in text
