"""Small values of the gateway's domain. Messages are opaque there, so any bytes do."""

import hashlib
from typing import Any

from services.gateway.domain.job import DIFFUSION, PREPROCESS, ControlImage, Facts, Input, StageRequest
from services.gateway.domain.plan import JobPlan, NewTask
from services.kernel.blobs import BlobInfo


def blob(name: str) -> BlobInfo:
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    return BlobInfo(scope="default", digest=digest, size_bytes=len(name), media_type="image/png")


def generation(message: bytes = b"a fox", *, checkpoint: str = "starter", **facts: Any) -> StageRequest:
    known = {"models": frozenset({checkpoint}), "steps": 20, "guided": True} | facts
    needs = known.pop("needs", frozenset({f"checkpoint:{checkpoint}"}))
    return StageRequest(
        stage=DIFFUSION, field="generation", message=message, facts=Facts(checkpoint=checkpoint, needs=needs, **known)
    )


def annotation(annotator: str = "canny", photo: str = "photo") -> StageRequest:
    facts = Facts(annotator=annotator, needs=frozenset({f"annotator:{annotator}"}))
    return StageRequest(stage=PREPROCESS, field="annotation", message=f"{annotator} {photo}".encode(), facts=facts)


def generation_plan(count: int = 1, *annotators: str, **facts: Any) -> JobPlan:
    """So many images, conditioned on control images that these annotators make of one photo."""
    makers = [annotation(each) for each in dict.fromkeys(annotators)]
    numbers = [list(dict.fromkeys(annotators)).index(each) + 1 for each in annotators]
    inputs = tuple(Input(field=f"controls[{i}].image", task=number) for i, number in enumerate(numbers))
    return JobPlan(
        requests=(generation(**facts), *makers, generation(b"a fox, made", **facts)),
        tasks=(
            *(NewTask(request=i) for i in range(1, len(makers) + 1)),
            *(NewTask(request=len(makers) + 1, patch=bytes([i]), inputs=inputs) for i in range(count)),
        ),
        control_images=tuple(
            ControlImage(annotator=each, task=number) for each, number in zip(annotators, numbers, strict=True)
        ),
        blobs=(blob("photo"),) if annotators else (),
    )


def annotation_plan(annotator: str = "canny", photo: str = "photo") -> JobPlan:
    return JobPlan(
        requests=(annotation(annotator, photo),),
        tasks=(NewTask(request=0),),
        control_images=(ControlImage(annotator=annotator, task=1),),
        blobs=(blob(photo),),
    )
