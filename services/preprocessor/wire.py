"""Protobuf to domain and back. The only file here that knows both; decides nothing else."""

from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.kernel.errors import InvalidField
from services.kernel.parameters import fill
from services.kernel.pictures import PictureLimits
from services.kernel.wire_parameters import description, plain
from services.preprocessor.annotation import Annotation, parse_size
from services.preprocessor.annotator import Annotator
from services.preprocessor.registry import Registry


def parse_request(request: preprocessor_pb2.AnnotateRequest, registry: Registry, limits: PictureLimits) -> Annotation:
    """NotFound, InvalidField and TooLarge name the request's field."""
    annotator = registry.get(request.annotator)
    return Annotation(
        annotator=annotator,
        parameters=fill(annotator.parameters, plain(request.parameters)),
        size=parse_size(request.width_px, request.height_px, limits),
        picture=_picture(request.picture),
    )


def _picture(picture: common_pb2.Picture) -> bytes:
    source = picture.WhichOneof("source")
    if source is None:
        raise InvalidField("is missing; send the encoded picture", field="picture")
    if source != "data":
        raise InvalidField("is not taken here; send the picture as data, or ask the gateway", field=f"picture.{source}")
    return picture.data


def annotator_to_proto(annotator: Annotator) -> preprocessor_pb2.Annotator:
    return preprocessor_pb2.Annotator(
        id=annotator.id,
        description=annotator.description,
        parameters=[description(parameter) for parameter in annotator.parameters],
        deterministic=annotator.deterministic,
        weight_bytes=annotator.weight_bytes,
        loaded=annotator.weight_bytes == 0,
        controlnets=annotator.controlnets,
        version=annotator.version,
        device=annotator.device,
        licence=annotator.licence,
    )
