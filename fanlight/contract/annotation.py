"""An AnnotateRequest, checked once: all that can be said about it without knowing a worker, and then its parameters.

Fields in errors are relative to the request, such as `parameters.low_threshold`.
"""

from collections.abc import Sequence

from google.protobuf.struct_pb2 import Struct

from fanlight.contract.fields import check_bytes, check_whole
from fanlight.contract.images import check_source
from fanlight.contract.limits import ANNOTATION_SIDE_MAX_PX, ANNOTATION_SIDE_MIN_PX, NAME_LIMIT_BYTES
from fanlight.contract.parameters import Parameter, check_struct, filled
from fanlight.errors import InvalidField
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest


def check(request: AnnotateRequest) -> None:
    """InvalidField or TooLarge about the first field that no worker could make a control image of."""
    if not request.annotator:
        raise InvalidField("is missing; name an annotator", field="annotator")
    check_bytes(request.annotator, NAME_LIMIT_BYTES, field="annotator")
    check_source(request.image, "image")
    check_struct(request.parameters, field="parameters")
    check_size(request.width_px, request.height_px)


def check_size(width_px: int, height_px: int) -> None:
    """InvalidField, fields `width_px` and `height_px`, unless both are 0 or both 16 to 8192."""
    if not width_px and not height_px:
        return
    for field, side_px in (("width_px", width_px), ("height_px", height_px)):
        if not side_px:
            raise InvalidField("is missing: give both sides or none", field=field)
        check_whole(side_px, ANNOTATION_SIDE_MIN_PX, ANNOTATION_SIDE_MAX_PX, field=field)


def check_parameters(request: AnnotateRequest, described: Sequence[Parameter]) -> Struct:
    """All of the annotator's parameters, those left out with their defaults. InvalidField below `parameters`.

    `described`: the annotator's own. Serialized deterministically, equal parameters give equal bytes.
    """
    return filled(request.parameters, described, field="parameters")
