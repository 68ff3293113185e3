"""An annotation request: checked, the annotator resolved, one task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fanlight.common.v1 import common_pb2
from fanlight.contract import annotation
from fanlight.contract.needs import Needs, needs_of_annotation
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.submission import KeptImage, SourceImage
from services.gateway.domain.job import PREPROCESS, ControlImage, Facts, StageRequest
from services.gateway.domain.moderation import Policy
from services.gateway.domain.plan import JobPlan, NewTask
from services.gateway.domain.workers import AnnouncedAnnotator
from services.gateway.wire.images import put_blob, source_images
from services.gateway.wire.needs import (
    NOTHING,
    Fleet,
    annotator_of,
    facts_of,
    newer_fields,
    require,
    require_stage,
    within,
)

FIELD = "annotation"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationDraft:
    request: preprocessor_pb2.AnnotateRequest
    facts: Facts
    images: Sequence[SourceImage]
    tasks_limit: int = 1

    def under(self, policy: Policy) -> "AnnotationDraft":
        """No worker checks control images."""
        return self

    def plan(self, kept: Mapping[str, KeptImage], draw: Callable[[], int]) -> JobPlan:
        blob = kept[f"{FIELD}.image"].blob
        image = common_pb2.ImageSource()
        image.CopyFrom(self.request.image)
        put_blob(image, blob)
        return JobPlan(
            requests=(stage_request(self.request, image, self.facts),),
            tasks=(NewTask(request=0),),
            control_images=(ControlImage(annotator=self.facts.annotator, task=1),),
            blobs=(blob,),
        )


def draft(message: preprocessor_pb2.AnnotateRequest, fleet: Fleet) -> AnnotationDraft:
    """InvalidField and NotFound name the field; Unavailable if no worker of the stage was ever seen."""
    with within(FIELD):
        annotation.check(message)
        annotator = annotator_for(message.annotator, fleet, field="annotator")
        request = resolved(message, annotator)
        facts = facts_for(request, fleet, newer_fields(message))
    return AnnotationDraft(request=request, facts=facts, images=source_images(message, FIELD))


def annotator_for(name: str, fleet: Fleet, *, field: str) -> AnnouncedAnnotator:
    """NotFound and Unavailable as above."""
    catalog = fleet.catalog()
    require_stage(catalog, PREPROCESS)
    return annotator_of(catalog, name, field=field)


def resolved(
    message: preprocessor_pb2.AnnotateRequest, annotator: AnnouncedAnnotator
) -> preprocessor_pb2.AnnotateRequest:
    """The request with the annotator's id and all of its parameters. InvalidField."""
    request = preprocessor_pb2.AnnotateRequest()
    request.CopyFrom(message)
    request.annotator = annotator.id
    request.parameters.CopyFrom(annotation.check_parameters(message, annotator.parameters))
    return request


def facts_for(
    request: preprocessor_pb2.AnnotateRequest, fleet: Fleet, newer: Needs = NOTHING, *, field: str = "annotator"
) -> Facts:
    """What `needs.require` raises. `field`: the one that names the annotator."""
    own = needs_of_annotation(request, field=field)
    needs = Needs(offers=(*own.offers, *newer.offers), amounts=own.amounts)
    require(fleet, PREPROCESS, needs)
    return facts_of(needs, annotator=request.annotator)


def stage_request(
    request: preprocessor_pb2.AnnotateRequest, image: common_pb2.ImageSource, facts: Facts
) -> StageRequest:
    whole = preprocessor_pb2.AnnotateRequest()
    whole.CopyFrom(request)
    whole.image.CopyFrom(image)
    message = whole.SerializeToString(deterministic=True)
    return StageRequest(stage=PREPROCESS, field=FIELD, message=message, facts=facts)
