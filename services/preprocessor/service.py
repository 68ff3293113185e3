"""The handlers of PreprocessorService: translate, call, translate."""

import time
from typing import Any

import grpc.aio

from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from services.kernel.errors import TooLarge
from services.kernel.pictures import PictureLimits
from services.preprocessor.annotation import MEDIA_TYPE, ControlImage
from services.preprocessor.engine import Engine
from services.preprocessor.registry import Registry
from services.preprocessor.wire import annotator_to_proto, parse_request
from services.worker.admission import Admission

# What an answer holds beside its image, with room to spare.
ANSWER_OVERHEAD_BYTES = 4096

Context = grpc.aio.ServicerContext[Any, Any]


class PreprocessorService(preprocessor_pb2_grpc.PreprocessorServiceServicer):
    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        admission: Admission,
        *,
        limits: PictureLimits,
        max_message_bytes: int,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._admission = admission
        self._limits = limits
        self._max_image_bytes = max_message_bytes - ANSWER_OVERHEAD_BYTES

    async def ListAnnotators(
        self, request: preprocessor_pb2.ListAnnotatorsRequest, context: Context
    ) -> preprocessor_pb2.ListAnnotatorsResponse:
        return preprocessor_pb2.ListAnnotatorsResponse(annotators=map(annotator_to_proto, self._registry))

    async def Annotate(
        self, request: preprocessor_pb2.AnnotateRequest, context: Context
    ) -> preprocessor_pb2.AnnotateResponse:
        asked = parse_request(request, self._registry, self._limits)
        arrived_s = time.perf_counter()
        async with self._admission.enter():
            waited_s = time.perf_counter() - arrived_s
            control = await self._engine.run(asked)
        return self._answer(control, waited_s)

    def _answer(self, control: ControlImage, waited_s: float) -> preprocessor_pb2.AnnotateResponse:
        if len(control.data) > self._max_image_bytes:
            raise TooLarge(
                f"makes a control image of {len(control.data)} bytes; at most {self._max_image_bytes} fit an answer: "
                "ask for a smaller width_px and height_px",
                field="picture",
            )
        spans = [("waiting", waited_s), *control.spans]
        return preprocessor_pb2.AnnotateResponse(
            image=control.data,
            media_type=MEDIA_TYPE,
            width_px=control.width_px,
            height_px=control.height_px,
            spans=[common_pb2.Span(name=name, duration_s=duration_s) for name, duration_s in spans],
        )
