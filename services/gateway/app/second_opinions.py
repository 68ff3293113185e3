"""Tasks whose worker says that the request is at fault, and that wait for another node's opinion; and for how long."""

from services.gateway.domain.job import Job
from services.gateway.ports import Clock
from services.gateway.scheduler.queue import Key

# A second opinion is waited for so long; then the first one counts.
OPINION_WAIT_S = 300.0


class SecondOpinions:
    """On this gateway's monotonic clock: a wall clock that jumps ends no job."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Until when, in monotonic seconds.
        self._due: dict[Key, float] = {}

    def observe(self, job: Job) -> None:
        for task in job.tasks:
            key = job.id, task.number
            if task.awaits_second_opinion:
                self._due.setdefault(key, self._clock.monotonic_s() + OPINION_WAIT_S)
            elif key in self._due:
                del self._due[key]

    def overdue(self) -> list[Key]:
        now_s = self._clock.monotonic_s()
        return [key for key, due_s in self._due.items() if due_s <= now_s]
