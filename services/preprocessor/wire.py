"""Protobuf to domain and back. The only file here that knows both; fanlight.contract decides what is valid."""

from fanlight.common.v1 import common_pb2
from fanlight.contract.annotation import check, check_parameters, description, plain
from fanlight.contract.images import data_of
from fanlight.contract.parameters import fill
from fanlight.errors import FanlightError, InvalidField, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation, AnnotationResult
from services.preprocessor.annotator import Annotator
from services.preprocessor.codec import PNG_MEDIA_TYPE
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import Registry, aliases_of
from services.preprocessor.sizing import Size, check_size


def parse_request(request: preprocessor_pb2.AnnotateRequest, registry: Registry, limits: ImageLimits) -> Annotation:
    """InvalidField as the contract says; NotFound and TooLarge for what this worker does not have or allow."""
    check(request)
    return _annotation(request, _image(request.image), registry, limits)


def _annotation(
    request: preprocessor_pb2.AnnotateRequest, image: bytes, registry: Registry, limits: ImageLimits
) -> Annotation:
    annotator = registry.get(request.annotator)
    return Annotation(
        annotator=annotator,
        parameters=fill(annotator.all_parameters, plain(check_parameters(request, annotator.all_parameters))),
        size=_size(request, limits),
        image=image,
    )


def _size(request: preprocessor_pb2.AnnotateRequest, limits: ImageLimits) -> Size | None:
    if not request.width_px:
        return None
    size = (request.width_px, request.height_px)
    check_size(size, limits, fields=("width_px", "height_px"))
    return size


def _image(source: common_pb2.ImageSource) -> bytes:
    if source.HasField("blob"):
        raise InvalidField(
            "is not accepted in direct calls; send the image's bytes, or ask the gateway", field="image.blob"
        )
    return data_of(source, "image")


def parse_many(
    request: preprocessor_pb2.AnnotateManyRequest, registry: Registry, limits: ImageLimits, *, at_most: int
) -> list[Annotation]:
    """As `parse_request` for each annotation; TooLarge for more than `at_most`."""
    if not request.annotations:
        raise InvalidField("is empty; name at least one annotator", field="annotations")
    if len(request.annotations) > at_most:
        raise TooLarge(
            f"has {len(request.annotations)}; at most {at_most} are allowed in one call", field="annotations"
        )
    image = _image(request.image)
    # One message for all, because it contains a copy of the image.
    single = preprocessor_pb2.AnnotateRequest(image=request.image)
    annotations = []
    for index, requested in enumerate(request.annotations):
        single.annotator = requested.annotator
        single.parameters.CopyFrom(requested.parameters)
        single.width_px, single.height_px = requested.width_px, requested.height_px
        try:
            check(single)
            annotations.append(_annotation(single, image, registry, limits))
        except FanlightError as error:
            raise error.within(f"annotations[{index}]") from error
    return annotations


def response_of(result: AnnotationResult, waited_s: float) -> preprocessor_pb2.AnnotateResponse:
    spans = [("waiting", waited_s), *result.spans]
    return preprocessor_pb2.AnnotateResponse(
        image=result.data,
        media_type=PNG_MEDIA_TYPE,
        width_px=result.width_px,
        height_px=result.height_px,
        spans=[common_pb2.Span(name=name, duration_s=duration_s) for name, duration_s in spans],
        pose_json=result.pose_json,
        device=result.device,
    )


def failure_of(error: FanlightError) -> common_pb2.Failure:
    return common_pb2.Failure(reason=error.reason, message=error.message, field=error.field, part=error.part)


def annotator_to_proto(
    annotator: Annotator, engine: AnnotationEngine, *, loaded: bool = False
) -> preprocessor_pb2.Annotator:
    return preprocessor_pb2.Annotator(
        id=annotator.id,
        description=annotator.description,
        parameters=[description(parameter) for parameter in annotator.all_parameters],
        deterministic=annotator.deterministic,
        weight_bytes=annotator.weight_bytes,
        loaded=loaded,
        controlnets=annotator.controlnets,
        version=annotator.version,
        device=engine.device_label(annotator),
        license=annotator.license,
        aliases=aliases_of(annotator.id),
    )
