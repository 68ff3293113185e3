"""What clients ask for: jobs made, told, watched and cancelled."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from services.gateway.app.new_job import NewJob
from services.gateway.jobs.model import Job, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a task is; best effort."""

    task: int
    step: int
    steps: int
    preview: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    jobs: Sequence[Job]
    # Empty on the last page.
    next_token: str


class Jobs:
    async def create(self, new: NewJob) -> Job:
        """Keep the pictures, then the job; durable on return. The same request id and content gives the first job.

        NotFound: no such blob. AlreadyExists: the request id was used for something else. ResourceExhausted: too
        many tasks wait.
        """
        raise NotImplementedError

    async def get(self, name: str) -> Job:
        """By its name `jobs/{id}`. NotFound."""
        raise NotImplementedError

    async def list(self, *, page_size: int, page_token: str, state: JobState | None) -> Page:
        """Newest first; `page_size` 0 is the default one. A page may be short of jobs and yet not be the last."""
        raise NotImplementedError

    async def cancel(self, name: str) -> Job:
        """Cancel what has not ended; an ended job stays as it is. NotFound."""
        raise NotImplementedError

    def watch(self, name: str, *, after_revision: int = 0) -> AsyncIterator[Job | Progress]:
        """States after that revision, the newest only where several came at once, and progress, until the job has
        ended. NotFound; Unavailable when the gateway stops.
        """
        raise NotImplementedError

    async def wait(self, name: str, *, wait_s: float) -> Job:
        """The job once it has ended, or as it is when the wait is over or the gateway stops. NotFound."""
        raise NotImplementedError
