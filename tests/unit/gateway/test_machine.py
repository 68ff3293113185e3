"""The life of a job, event by event, and under any sequence of events."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fanlight.errors import Conflict, FailedPrecondition, LeaseLost
from services.gateway.domain import machine, plan
from services.gateway.domain.job import Failure, Fault, Job, JobState, Lease, Output, TaskState
from services.gateway.domain.machine import FAILURES_LIMIT, LOST_LEASES_LIMIT, LeaseStatus
from tests.fakes.jobs import annotation_plan, blob, generation_plan

CRASH = Failure(reason="NODE_FAULT", message="out of memory")
WRONG = Failure(reason="INVALID_FIELD", message="no such layer", field="model")


def job_of(count: int = 1, *annotators: str) -> Job:
    return plan.create(generation_plan(count, *annotators), job_id="j", request_id="", priority=0, now_s=0.0)


def leased(job: Job, number: int = 1, token: str = "a", *, node: str = "n", batch_size: int = 1) -> Job:
    lease = Lease(token=token, worker=f"w-{node}", node=node, time_s=1.0, batch_size=batch_size)
    return machine.lease(job, number, lease, now_s=1.0)


def completed(job: Job, number: int = 1, token: str = "a") -> Job:
    output = Output(blob=blob(f"out-{number}-{token}"), width_px=8, height_px=8)
    return machine.complete(job, number, token, outputs=[output], spans=[], now_s=2.0)


def failed(job: Job, token: str, fault: Fault = Fault.NODE, number: int = 1) -> Job:
    failure = WRONG if fault is Fault.REQUEST else CRASH
    return machine.fail(job, number, token, fault=fault, failure=failure, now_s=3.0)


def states(job: Job) -> list[str]:
    return [task.state.value for task in job.tasks]


def test_many_images_share_one_annotation() -> None:
    job = job_of(3, "canny")
    assert states(job) == ["queued", "blocked", "blocked", "blocked"]


def test_two_controls_of_one_image_and_annotator_are_annotated_once() -> None:
    job = job_of(1, "canny", "canny", "tile")
    assert states(job) == ["queued", "queued", "blocked"]
    assert [image.task for image in job.control_images] == [1, 1, 2]


def test_images_wait_for_the_last_of_their_control_images() -> None:
    job = completed(leased(job_of(2, "canny", "tile")))
    assert states(job) == ["succeeded", "queued", "blocked", "blocked"]
    job = completed(leased(job, 2, "b"), 2, "b")
    assert states(job) == ["succeeded", "succeeded", "queued", "queued"]
    made = [job.output_of(image.task) for image in job.control_images]
    assert [output and output.blob for output in made] == [blob("out-1-a"), blob("out-2-b")]


def test_a_job_whose_images_all_exist_has_nothing_to_do() -> None:
    made = {1: Output(blob=blob("map"), width_px=8, height_px=8)}
    job = plan.create(annotation_plan(), job_id="j", request_id="", priority=0, now_s=5.0, made_before=made)
    assert (job.state, job.end_time_s, job.tasks) == (JobState.SUCCEEDED, 5.0, ())
    assert [(image.blob, image.cached) for image in job.control_images] == [(blob("map"), True)]


def test_a_leased_task_cannot_be_leased_again() -> None:
    with pytest.raises(Conflict):
        leased(leased(job_of()), token="b")


def test_a_job_succeeds_with_its_last_task() -> None:
    job = completed(leased(job_of(2)))
    assert job.state is JobState.RUNNING
    job = completed(leased(job, 2, "b"), 2, "b")
    assert (job.state, job.end_time_s) == (JobState.SUCCEEDED, 2.0)


def test_completing_again_with_the_same_token_changes_nothing() -> None:
    job = completed(leased(job_of()))
    assert completed(job) is job


def test_a_late_worker_is_told_to_drop_the_work() -> None:
    again = leased(machine.expire(leased(job_of()), 1, "a", now_s=9.0), token="b")
    with pytest.raises(LeaseLost):
        completed(again, token="a")
    with pytest.raises(LeaseLost):
        failed(again, "a")
    assert completed(again, token="b").state is JobState.SUCCEEDED


def test_a_fault_of_the_request_ends_the_job_at_once_and_is_no_dead_letter() -> None:
    job = failed(leased(job_of(2)), "a", Fault.REQUEST)
    assert states(job) == ["failed", "cancelled"]
    assert (job.state, job.failure) == (JobState.FAILED, WRONG)
    assert not job.tasks[0].dead


def test_a_failed_job_keeps_what_was_finished() -> None:
    job = failed(leased(completed(leased(job_of(2))), 2, "b"), "b", Fault.REQUEST, 2)
    assert states(job) == ["succeeded", "failed"]
    assert job.tasks[0].outputs


def test_faults_of_nodes_are_counted_and_then_the_task_is_dead() -> None:
    job = job_of()
    for attempt in range(FAILURES_LIMIT):
        assert states(job) == ["queued"]
        job = failed(leased(job, token=str(attempt), node=f"n{attempt}"), str(attempt))
    assert (job.state, job.failure, job.tasks[0].dead) == (JobState.FAILED, CRASH, True)
    assert job.tasks[0].failed_nodes == {"n0", "n1", "n2"}


def test_lost_leases_are_counted_apart_and_no_node_is_blamed() -> None:
    job = job_of()
    for attempt in range(LOST_LEASES_LIMIT):
        assert states(job) == ["queued"]
        job = machine.expire(leased(job, token=str(attempt)), 1, str(attempt), now_s=4.0)
    assert job.tasks[0].dead
    assert job.failure is not None
    assert job.failure.reason == "LEASES_LOST"
    assert job.tasks[0].failed_nodes == frozenset()


def test_a_task_that_was_given_back_counts_nothing() -> None:
    job = job_of()
    for attempt in range(LOST_LEASES_LIMIT + 1):
        job = machine.give_back(leased(job, token=str(attempt)), 1, str(attempt), now_s=4.0)
    assert states(job) == ["queued"]
    assert job.tasks[0].attempts == ()


def test_a_task_whose_batch_died_runs_alone() -> None:
    job = machine.expire(leased(job_of(), batch_size=2), 1, "a", now_s=4.0)
    assert job.tasks[0].alone


def test_a_lease_that_the_worker_never_got_says_nothing_about_its_batch() -> None:
    job = machine.expire(leased(job_of(), batch_size=2), 1, "a", now_s=4.0, unheld=True)
    assert not job.tasks[0].alone


def test_a_lease_that_the_worker_never_got_costs_nothing() -> None:
    job = machine.expire(leased(job_of()), 1, "a", now_s=4.0, unheld=True)
    assert states(job) == ["queued"]
    assert job.tasks[0].attempts == ()


def test_leases_that_never_arrive_do_not_go_on_forever() -> None:
    job = job_of()
    while not job.state.ended:
        job = machine.expire(leased(job), 1, "a", now_s=4.0, unheld=True)
    assert job.tasks[0].dead
    assert job.tasks[0].leases == machine.LEASES_LIMIT + machine.LOST_LEASES_LIMIT - 1


def test_a_batch_that_never_arrived_is_no_reason_to_run_alone_even_when_it_counts_as_an_attempt() -> None:
    job = job_of()
    while not job.tasks[0].attempts:
        job = machine.expire(leased(job, batch_size=2), 1, "a", now_s=4.0, unheld=True)
    assert job.tasks[0].leases == machine.LEASES_LIMIT
    assert not job.tasks[0].alone


def test_a_cancelled_job_never_completes() -> None:
    job = machine.cancel(leased(job_of(2)), now_s=4.0)
    assert states(job) == ["cancelled", "cancelled"]
    assert machine.lease_status(job, 1, "a") is LeaseStatus.CANCELLED
    with pytest.raises(LeaseLost):
        completed(job)
    assert machine.cancel(job, now_s=5.0) is job


class Life(RuleBasedStateMachine):
    """Workers lease, vanish, come back late and lie about tokens; what must hold holds after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.job = job_of(2, "canny")
        self.tokens: list[tuple[int, str]] = []
        # Those that were refused once: they must stay refused.
        self.spent: set[str] = set()
        self.is_cancelled = False
        self.now_s = 0.0

    def now(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def become(self, job: Job) -> None:
        before, self.job = self.job, job
        assert job is before or job.revision == before.revision + 1
        for old, new in zip(before.tasks, job.tasks, strict=True):
            assert new == old or not old.state.ended, "a task ends once"
        self.note_spent()

    def note_spent(self) -> None:
        statuses = {token: machine.lease_status(self.job, number, token) for number, token in self.tokens}
        live = {token for token, status in statuses.items() if status is LeaseStatus.LIVE}
        assert not live & self.spent, "a token that was lost never lives again"
        self.spent |= {token for token, status in statuses.items() if status is not LeaseStatus.LIVE}

    @rule(number=st.integers(1, 3), node=st.sampled_from("xyz"), batch_size=st.integers(1, 2))
    def a_worker_leases(self, number: int, node: str, batch_size: int) -> None:
        token = f"t{len(self.tokens)}"
        lease = Lease(token=token, worker=node, node=node, time_s=self.now(), batch_size=batch_size)
        waiting = self.job.tasks[number - 1].state is TaskState.QUEUED
        try:
            self.become(machine.lease(self.job, number, lease, now_s=self.now()))
        except Conflict:
            assert not waiting
        else:
            assert waiting
            self.tokens.append((number, token))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), what=st.sampled_from(["complete", "request", "node", "back"]))
    def a_worker_answers_in_time_or_late(self, data: st.DataObject, what: str) -> None:
        number, token = data.draw(st.sampled_from(self.tokens))
        held = machine.lease_status(self.job, number, token)
        try:
            if what == "complete":
                self.become(completed(self.job, number, token))
            elif what == "back":
                self.become(machine.give_back(self.job, number, token, now_s=self.now()))
            else:
                self.become(failed(self.job, token, Fault(what), number))
        except LeaseLost:
            assert held is not LeaseStatus.LIVE
        else:
            assert held is LeaseStatus.LIVE or (what == "complete" and held is LeaseStatus.COMPLETED)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), unheld=st.booleans())
    def a_lease_expires(self, data: st.DataObject, unheld: bool) -> None:
        number, token = data.draw(st.sampled_from(self.tokens))
        self.become(machine.expire(self.job, number, token, now_s=self.now(), unheld=unheld))

    @rule(chance=st.integers(0, 9))
    def the_client_cancels_now_and_then(self, chance: int) -> None:
        if chance == 0:
            self.is_cancelled = self.is_cancelled or not self.job.state.ended
            self.become(machine.cancel(self.job, now_s=self.now()))

    @rule(chance=st.integers(0, 19))
    def the_deadline_passes_now_and_then(self, chance: int) -> None:
        if chance == 0:
            was_open = not self.job.state.ended
            self.become(machine.miss_deadline(self.job, now_s=self.now()))
            assert not was_open or (self.job.failure and self.job.failure.reason == "DEADLINE_EXCEEDED")

    @rule()
    def somebody_redrives_it(self) -> None:
        before = self.job
        is_dead = any(task.dead for task in before.tasks)
        try:
            self.job = machine.redrive(before, now_s=self.now())
        except FailedPrecondition:
            assert not is_dead
            return
        assert is_dead
        assert not self.job.state.ended
        for old, new in zip(before.tasks, self.job.tasks, strict=True):
            assert new == old or old.state is not TaskState.SUCCEEDED, "what was finished stays finished"
            assert new.attempts == old.attempts, "what happened stays told"
        self.note_spent()

    @invariant()
    def a_cancelled_job_stays_cancelled_and_takes_no_result(self) -> None:
        assert not self.is_cancelled or self.job.state is JobState.CANCELLED

    @invariant()
    def nothing_is_lost(self) -> None:
        """What has not ended can be leased, is leased, or waits for what can be."""
        for task in self.job.tasks:
            assert task.state.ended or task.state in (TaskState.QUEUED, TaskState.LEASED, TaskState.BLOCKED)
            assert task.state is not TaskState.LEASED or task.lease is not None
            assert task.state is not TaskState.SUCCEEDED or task.outputs
        if not self.job.state.ended:
            assert any(task.state in (TaskState.QUEUED, TaskState.LEASED) for task in self.job.tasks)

    @invariant()
    def a_task_waits_after_a_failure_and_never_longer_than_the_longest_pause(self) -> None:
        for task in self.job.tasks:
            if task.not_before_s:
                assert task.not_before_s - self.now_s <= machine.BACKOFF_MAX_S

    @invariant()
    def a_task_has_at_most_one_live_lease(self) -> None:
        for task in self.job.tasks:
            live = [
                t
                for n, t in self.tokens
                if n == task.number and machine.lease_status(self.job, n, t) is LeaseStatus.LIVE
            ]
            assert len(live) == (task.state is TaskState.LEASED)

    @invariant()
    def the_job_ends_when_and_only_when_all_its_tasks_have(self) -> None:
        ended = all(task.state.ended for task in self.job.tasks)
        assert self.job.state.ended == ended
        assert (self.job.state is JobState.SUCCEEDED) == all(t.state is TaskState.SUCCEEDED for t in self.job.tasks)
        assert (self.job.failure is not None) == (self.job.state is JobState.FAILED)

    @invariant()
    def pictures_are_blocked_exactly_while_their_control_image_is_missing(self) -> None:
        if not self.job.state.ended:
            missing = self.job.tasks[0].state is not TaskState.SUCCEEDED
            assert all((task.state is TaskState.BLOCKED) == missing for task in self.job.tasks[1:])

    @invariant()
    def attempts_stay_within_their_limits(self) -> None:
        for task in self.job.tasks:
            assert len(task.counted) < FAILURES_LIMIT + LOST_LEASES_LIMIT
            assert task.dead <= (task.state is TaskState.FAILED)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


def judged(count: int = 1, *annotators: str) -> Job:
    return replace(job_of(count, *annotators), is_judged=True)


def test_a_result_that_is_judged_is_published_only_by_its_verdict() -> None:
    job = completed(leased(judged()))
    assert (states(job), job.state) == (["judging"], JobState.RUNNING)
    assert machine.lease_status(job, 1, "a") is LeaseStatus.COMPLETED
    assert completed(job) is job
    done = machine.publish(job, 1, labels=("a",), now_s=9.0)
    assert (states(done), done.state, done.end_time_s) == (["succeeded"], JobState.SUCCEEDED, 9.0)
    assert done.tasks[0].outputs[0].labels == ("a",)


def test_a_result_that_is_withheld_fails_the_job_and_is_dropped() -> None:
    job = completed(leased(judged(2)))
    failure = Failure(reason="CONTENT_BLOCKED", message="no")
    after = machine.withhold(job, 1, failure=failure, now_s=9.0)
    assert (states(after), after.failure, after.tasks[0].outputs) == (["failed", "cancelled"], failure, ())
    with pytest.raises(FailedPrecondition):
        machine.redrive(after, now_s=10.0)


def test_only_the_first_verdict_counts() -> None:
    failure = Failure(reason="CONTENT_BLOCKED", message="no")
    job = completed(leased(judged()))
    published = machine.publish(job, 1, now_s=9.0)
    assert machine.withhold(published, 1, failure=failure, now_s=10.0) is published
    withheld = machine.withhold(job, 1, failure=failure, now_s=9.0)
    assert machine.publish(withheld, 1, now_s=10.0) is withheld
    cancelled = machine.cancel(job, now_s=9.0)
    assert (cancelled.tasks[0].outputs, machine.publish(cancelled, 1, now_s=10.0)) == ((), cancelled)


def test_control_images_on_the_way_are_not_judged() -> None:
    job = completed(leased(judged(1, "canny")))
    assert states(job) == ["succeeded", "queued"]
    assert states(completed(leased(job, 2), 2)) == ["succeeded", "judging"]
