"""How a job becomes tasks: one for each distinct control image to make, one for each picture to paint."""

from collections.abc import Sequence

from services.gateway.jobs.model import (
    DEFAULT_TENANT,
    DIFFUSION,
    PREPROCESS,
    TASKS_LIMIT,
    Annotation,
    ControlImage,
    Job,
    JobState,
    Paint,
    Task,
    TaskState,
    Work,
)

# An image that exists already, or the work that makes it.
Wanted = ControlImage | Annotation


def wanted_of(work: Work) -> list[Wanted]:
    """What the work is conditioned on, in its order; a picture without an annotator is a control image itself.

    Control images are made at the size of what they condition: thin lines do not survive being scaled down later.
    """
    if isinstance(work, Annotation):
        return [work]
    return [
        Annotation(
            picture=control.picture,
            annotator=control.annotator,
            parameters=control.parameters,
            width_px=work.width_px,
            height_px=work.height_px,
        )
        if control.annotator and control.picture
        else ControlImage(blob=control.picture, annotator="")
        for control in work.controls
    ]


def create(
    *,
    job_id: str,
    request_id: str,
    priority: int,
    work: Work,
    wanted: Sequence[Wanted],
    seeds: Sequence[int],
    now_s: float,
    tenant: str = DEFAULT_TENANT,
    deadline_s: float = 0.0,
    webhook_url: str = "",
) -> Job:
    """`wanted`: as of `wanted_of`, with images in the place of what a cache had; `seeds`: one for each picture."""
    numbers: dict[Annotation, int] = {}
    images = [_image(each, numbers) for each in wanted]
    annotations = [_annotate(number, annotation, now_s) for annotation, number in numbers.items()]
    paints = [_paint(len(numbers) + 1 + i, seed, bool(numbers), now_s) for i, seed in enumerate(seeds)]
    tasks = (*annotations, *paints)
    assert len(tasks) <= TASKS_LIMIT
    return Job(
        id=job_id,
        state=JobState.QUEUED if tasks else JobState.SUCCEEDED,
        create_time_s=now_s,
        end_time_s=0.0 if tasks else now_s,
        priority=priority,
        request_id=request_id,
        work=work,
        tasks=tasks,
        control_images=tuple(images),
        tenant=tenant,
        deadline_s=deadline_s,
        webhook_url=webhook_url,
    )


def _image(wanted: Wanted, numbers: dict[Annotation, int]) -> ControlImage:
    if isinstance(wanted, ControlImage):
        return wanted
    number = numbers.setdefault(wanted, len(numbers) + 1)
    return ControlImage(blob=None, annotator=wanted.annotator, task=number)


def _annotate(number: int, work: Annotation, now_s: float) -> Task:
    return Task(number=number, stage=PREPROCESS, work=work, state=TaskState.QUEUED, queue_time_s=now_s)


def _paint(number: int, seed: int, blocked: bool, now_s: float) -> Task:
    return Task(
        number=number,
        stage=DIFFUSION,
        work=Paint(seed=seed),
        state=TaskState.BLOCKED if blocked else TaskState.QUEUED,
        queue_time_s=0.0 if blocked else now_s,
    )
