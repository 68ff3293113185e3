"""Protobuf to domain and back. The only file here that knows both; decides nothing else."""

from collections.abc import Mapping

from google.protobuf import struct_pb2

from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.kernel.errors import InvalidField
from services.kernel.parameters import Parameter, fill
from services.kernel.pictures import PictureLimits
from services.preprocessor.annotation import Annotation, parse_size
from services.preprocessor.annotator import Annotator
from services.preprocessor.registry import Registry

_KINDS = {
    bool: preprocessor_pb2.Parameter.KIND_BOOLEAN,
    int: preprocessor_pb2.Parameter.KIND_INTEGER,
    float: preprocessor_pb2.Parameter.KIND_NUMBER,
    str: preprocessor_pb2.Parameter.KIND_TEXT,
}


def parse_request(request: preprocessor_pb2.AnnotateRequest, registry: Registry, limits: PictureLimits) -> Annotation:
    """NotFound, InvalidField and TooLarge name the request's field."""
    annotator = registry.get(request.annotator)
    return Annotation(
        annotator=annotator,
        parameters=fill(annotator.parameters, _plain(request.parameters)),
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


def _plain(parameters: struct_pb2.Struct) -> Mapping[str, object]:
    """Booleans, numbers and texts; None stands for what no parameter can be."""
    return {name: _plain_value(value) for name, value in parameters.fields.items()}


def _plain_value(value: struct_pb2.Value) -> bool | float | str | None:
    match value.WhichOneof("kind"):
        case "bool_value":
            return value.bool_value
        case "number_value":
            return value.number_value
        case "string_value":
            return value.string_value
    return None


def annotator_to_proto(annotator: Annotator) -> preprocessor_pb2.Annotator:
    return preprocessor_pb2.Annotator(
        id=annotator.id,
        description=annotator.description,
        parameters=[_parameter_to_proto(parameter) for parameter in annotator.parameters],
        deterministic=annotator.deterministic,
        weight_bytes=annotator.weight_bytes,
        loaded=annotator.weight_bytes == 0,
        controlnets=annotator.controlnets,
        version=annotator.version,
        device=annotator.device,
        licence=annotator.licence,
    )


def _parameter_to_proto(parameter: Parameter) -> preprocessor_pb2.Parameter:
    default = struct_pb2.Value()
    match parameter.default:
        case bool():
            default.bool_value = parameter.default
        case str():
            default.string_value = parameter.default
        case _:
            default.number_value = parameter.default
    return preprocessor_pb2.Parameter(
        name=parameter.name,
        kind=_KINDS[type(parameter.default)],
        description=parameter.description,
        default_value=default,
        minimum=parameter.minimum,
        maximum=parameter.maximum,
        choices=parameter.choices,
    )
