"""The handlers of PreprocessorService: translate, call, translate."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio

from fanlight.contract.revision import refuse_unknown_fields
from fanlight.errors import FanlightError, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from services.kernel.pictures import PictureLimits
from services.kernel.rpc_guard import known
from services.preprocessor.annotation import Annotation, ControlImage, Source
from services.preprocessor.engine import Engine
from services.preprocessor.registry import Registry
from services.preprocessor.wire import annotator_to_proto, answer, failure, parse_many, parse_request
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
        annotations_limit: int = 32,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._admission = admission
        self._limits = limits
        self._max_image_bytes = max_message_bytes - ANSWER_OVERHEAD_BYTES
        self._annotations_limit = annotations_limit

    async def ListAnnotators(
        self, request: preprocessor_pb2.ListAnnotatorsRequest, context: Context
    ) -> preprocessor_pb2.ListAnnotatorsResponse:
        listed = [
            annotator_to_proto(annotator, self._engine, loaded=self._engine.holds(annotator))
            for annotator in self._registry
        ]
        return preprocessor_pb2.ListAnnotatorsResponse(annotators=listed)

    async def Annotate(
        self, request: preprocessor_pb2.AnnotateRequest, context: Context
    ) -> preprocessor_pb2.AnnotateResponse:
        refuse_unknown_fields(request)
        return await self._annotate(parse_request(request, self._registry, self._limits))

    async def AnnotateMany(
        self, request: preprocessor_pb2.AnnotateManyRequest, context: Context
    ) -> AsyncIterator[preprocessor_pb2.AnnotateManyResponse]:
        refuse_unknown_fields(request)
        asked = parse_many(request, self._registry, self._limits, at_most=self._annotations_limit)
        async with self._admission.enter():
            source = await self._engine.decode(asked)
        done: asyncio.Queue[preprocessor_pb2.AnnotateManyResponse] = asyncio.Queue()
        # No TaskGroup: one that a generator is closed in takes that for an error.
        running = asyncio.create_task(self._annotate_all(asked, source, done))
        try:
            for _ in asked:
                yield await done.get()
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def _annotate_all(
        self,
        asked: Sequence[Annotation],
        source: Source,
        done: asyncio.Queue[preprocessor_pb2.AnnotateManyResponse],
    ) -> None:
        """One after another for each slot, so that a call waits for no more slots than there are."""
        left = iter(enumerate(asked))

        async def work() -> None:
            for index, each in left:
                done.put_nowait(await self._one_of_many(index, each, source))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._admission.slots, len(asked))):
                group.create_task(work())

    async def _one_of_many(
        self, index: int, asked: Annotation, source: Source
    ) -> preprocessor_pb2.AnnotateManyResponse:
        try:
            annotated = await known(lambda: self._annotate(asked, source))
            return preprocessor_pb2.AnnotateManyResponse(index=index, answer=annotated)
        except FanlightError as error:
            return preprocessor_pb2.AnnotateManyResponse(index=index, failure=failure(error))

    async def _annotate(self, asked: Annotation, source: Source | None = None) -> preprocessor_pb2.AnnotateResponse:
        arrived_s = time.perf_counter()
        async with self._admission.enter():
            waited_s = time.perf_counter() - arrived_s
            control = await self._engine.run(asked, source)
        self._check_size(control)
        return answer(control, waited_s)

    def _check_size(self, control: ControlImage) -> None:
        size_bytes = len(control.data) + len(control.pose_json)
        if size_bytes > self._max_image_bytes:
            raise TooLarge(
                f"makes a control image of {size_bytes} bytes; at most {self._max_image_bytes} fit an answer: "
                "ask for a smaller width_px and height_px",
                field="image",
            )
