"""The request for an image's thumbnail: an annotation by an annotator that every preprocess worker has."""

from fanlight.contract.needs import needs_of_annotation
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.domain.job import PREPROCESS, StageRequest
from services.gateway.domain.thumbnails import SIDE_PX
from services.gateway.wire.annotations import FIELD
from services.gateway.wire.needs import facts_of

# It resizes the image to the asked size and changes nothing else.
ANNOTATOR = "ip2p"


def thumbnail_request() -> StageRequest:
    """Without its image, which each task gives."""
    request = preprocessor_pb2.AnnotateRequest(annotator=ANNOTATOR, width_px=SIDE_PX, height_px=SIDE_PX)
    facts = facts_of(needs_of_annotation(request, field="annotator"), annotator=ANNOTATOR)
    return StageRequest(
        stage=PREPROCESS, field=FIELD, message=request.SerializeToString(deterministic=True), facts=facts
    )
