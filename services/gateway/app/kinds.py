"""A job's tasks as ordering sees them: what they need, and how much work they are."""

from services.gateway.jobs.model import Annotation, Generation, Job, Task
from services.gateway.jobs.painting import loras_in
from services.gateway.ordering.tasks import Kind

# What the diffusion service takes where a request says nothing, and below what there is no guidance.
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 5.0
NO_GUIDANCE = 1.0


def kind_of(job: Job, task: Task) -> Kind:
    if isinstance(task.work, Annotation):
        return Kind(stage=task.stage, needs=frozenset({f"annotator:{task.work.annotator}"}))
    work = job.work
    assert isinstance(work, Generation)
    guidance = DEFAULT_GUIDANCE if work.guidance_scale is None else work.guidance_scale
    return Kind(
        stage=task.stage,
        needs=work.needs,
        checkpoint=work.model,
        models=_models(work),
        loras=_loras(work),
        width_px=work.width_px,
        height_px=work.height_px,
        guided=guidance > NO_GUIDANCE,
    )


def _models(work: Generation) -> frozenset[str]:
    """Their ids or references, as workers report what they hold."""
    options = work.options
    named = [work.model, options.vae, *options.embeddings, *(each.controlnet for each in work.controls)]
    return frozenset([*filter(None, named), *(name for name, _ in _loras(work))])


def _loras(work: Generation) -> tuple[tuple[str, float], ...]:
    """By name, with their weights; those that the prompt names are weighted there, by the worker."""
    weights = {use.model: 1.0 if use.weight is None else use.weight for use in work.options.loras}
    return tuple(sorted((dict.fromkeys(loras_in(work.prompt), 0.0) | weights).items()))


def steps_of(job: Job, task: Task) -> int:
    if isinstance(task.work, Annotation):
        return 0
    assert isinstance(job.work, Generation)
    return job.work.steps or DEFAULT_STEPS
