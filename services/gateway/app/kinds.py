"""A job's tasks as ordering sees them: what they need, and how much work they are."""

from fanlight.contract.sizes import size_class
from services.gateway.jobs.model import Job, Task
from services.gateway.ordering.tasks import Kind


def kind_of(job: Job, task: Task) -> Kind:
    facts = job.request_of(task).facts
    return Kind(
        stage=task.stage,
        needs=facts.needs,
        amounts=facts.amounts,
        checkpoint=facts.checkpoint,
        family=facts.family,
        models=facts.models,
        loras=facts.loras,
        width_px=facts.width_px,
        height_px=facts.height_px,
        size_class=size_class(facts.width_px, facts.height_px),
        guided=facts.guided,
    )


def steps_of(job: Job, task: Task) -> int:
    return job.request_of(task).facts.steps
