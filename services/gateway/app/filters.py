"""Which jobs a list is asked for."""

from dataclasses import dataclass

from services.gateway.jobs.model import Job, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Only:
    """What is None, empty or 0 takes all."""

    state: JobState | None = None
    model: str = ""
    annotator: str = ""
    tenant: str = ""
    created_from_s: float = 0.0
    created_before_s: float = 0.0

    def takes(self, job: Job) -> bool:
        return (
            (self.state is None or job.state is self.state)
            and (not self.tenant or job.tenant == self.tenant)
            and (not self.model or job.asked.facts.checkpoint == self.model)
            and (not self.annotator or job.asked.facts.annotator == self.annotator)
            and self.created_from_s <= job.create_time_s
            and (not self.created_before_s or job.create_time_s < self.created_before_s)
        )


EVERYTHING = Only()
