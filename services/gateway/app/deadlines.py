"""Which open jobs must have ended by when, on this gateway's own clock: a wall clock that jumps ends no job."""

from services.gateway.jobs.model import Job
from services.gateway.ports import Clock


class Deadlines:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Job id to monotonic seconds, and the deadline that they were reckoned from.
        self._due: dict[str, tuple[float, float]] = {}

    def observe(self, job: Job) -> None:
        if job.state.ended or not job.deadline_s:
            self._due.pop(job.id, None)
        elif self._due.get(job.id, (0.0, 0.0))[1] != job.deadline_s:
            left_s = job.deadline_s - self._clock.now_s()
            self._due[job.id] = (self._clock.monotonic_s() + left_s, job.deadline_s)

    def passed(self) -> list[str]:
        """Ids of open jobs whose time is over."""
        now_s = self._clock.monotonic_s()
        return [job_id for job_id, (due_s, _) in self._due.items() if due_s <= now_s]
