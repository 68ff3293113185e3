"""The two ways in: direct calls of PreprocessorService, and leased tasks of the stage `preprocess`.

Both translate, call the engine and translate back.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Any

import grpc.aio

from fanlight.channel import MAX_MESSAGE_BYTES
from fanlight.contract.needs import PIXELS, refuse_unknown_fields
from fanlight.errors import FanlightError, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from fanlight.queue.v1 import queue_pb2
from services.kernel.grpc_guards import hide_unexpected_errors
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation, AnnotationResult, SharedImage
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.faults import blames
from services.preprocessor.registry import Registry
from services.preprocessor.wire import annotator_to_proto, failure_of, parse_many, parse_request, response_of
from services.worker.admission import Admission
from services.worker.ports import Outcome, Report, StageOutput, StageProgress

# The size of a response without its image, with room to spare.
RESPONSE_OVERHEAD_BYTES = 4096
# The most annotations of one image that one call may request.
ANNOTATIONS_LIMIT = 32

Context = grpc.aio.ServicerContext[Any, Any]


class PreprocessorService(preprocessor_pb2_grpc.PreprocessorServiceServicer):
    """Direct calls. Each annotation waits for a slot, which the lease loop uses too."""

    def __init__(
        self,
        registry: Registry,
        engine: AnnotationEngine,
        admission: Admission,
        *,
        limits: ImageLimits,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        annotations_limit: int = ANNOTATIONS_LIMIT,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._admission = admission
        self._limits = limits
        self._max_image_bytes = max_message_bytes - RESPONSE_OVERHEAD_BYTES
        self._annotations_limit = annotations_limit

    async def ListAnnotators(
        self, request: preprocessor_pb2.ListAnnotatorsRequest, context: Context
    ) -> preprocessor_pb2.ListAnnotatorsResponse:
        listed = [
            annotator_to_proto(annotator, self._engine, loaded=self._engine.is_loaded(annotator))
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
        annotations = parse_many(request, self._registry, self._limits, at_most=self._annotations_limit)
        async with self._admission.enter():
            shared_image = await self._engine.decode(annotations)
        done: asyncio.Queue[preprocessor_pb2.AnnotateManyResponse] = asyncio.Queue()
        # Not a TaskGroup: if the generator is closed inside one, the group reports that as an error.
        running = asyncio.create_task(self._annotate_all(annotations, shared_image, done))
        try:
            for _ in annotations:
                yield await done.get()
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def _annotate_all(
        self,
        annotations: Sequence[Annotation],
        shared_image: SharedImage,
        done: asyncio.Queue[preprocessor_pb2.AnnotateManyResponse],
    ) -> None:
        """At most one at a time per slot, so that a call does not wait for more slots than there are."""
        left = iter(enumerate(annotations))

        async def work() -> None:
            for index, annotation in left:
                done.put_nowait(await self._one_of_many(index, annotation, shared_image))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._admission.slots, len(annotations))):
                group.create_task(work())

    async def _one_of_many(
        self, index: int, annotation: Annotation, shared_image: SharedImage
    ) -> preprocessor_pb2.AnnotateManyResponse:
        try:
            annotated = await hide_unexpected_errors(lambda: self._annotate(annotation, shared_image))
            return preprocessor_pb2.AnnotateManyResponse(index=index, answer=annotated)
        except FanlightError as error:
            return preprocessor_pb2.AnnotateManyResponse(index=index, failure=failure_of(error))

    async def _annotate(
        self, annotation: Annotation, shared_image: SharedImage | None = None
    ) -> preprocessor_pb2.AnnotateResponse:
        arrived_s = time.perf_counter()
        async with self._admission.enter():
            waited_s = time.perf_counter() - arrived_s
            result = await self._engine.run(annotation, shared_image)
        self._check_size(result)
        return response_of(result, waited_s)

    def _check_size(self, result: AnnotationResult) -> None:
        size_bytes = len(result.data) + len(result.pose_json)
        if size_bytes > self._max_image_bytes:
            raise TooLarge(
                f"gives a control image of {size_bytes} bytes; at most {self._max_image_bytes} fit a response: "
                "ask for a smaller width_px and height_px",
                field="image",
            )


class PreprocessStage:
    """The stage for the lease loop: leased tasks in, control images out. The loop holds a slot during each `run`."""

    name = "preprocess"
    request_type = preprocessor_pb2.AnnotateRequest

    def __init__(self, registry: Registry, engine: AnnotationEngine, *, limits: ImageLimits) -> None:
        self._registry = registry
        self._engine = engine
        self._limits = limits

    def capabilities(self) -> queue_pb2.Capabilities:
        return self._capabilities

    @cached_property
    def _capabilities(self) -> queue_pb2.Capabilities:
        """Built at the first poll: it reads the weights' manifests, which direct calls may never need."""
        return queue_pb2.Capabilities(
            annotators=[annotator_to_proto(each, self._engine) for each in self._registry],
            limits=[queue_pb2.Limit(name=PIXELS, maximum=self._limits.pixels)],
        )

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = self._engine.device.kind
        # With a prefix, because ControlNets have the same ids.
        worker.ram_models[:] = [f"annotator:{each.id}" for each in self._registry if self._engine.is_loaded(each)]

    async def run(
        self, request: preprocessor_pb2.AnnotateRequest, task: queue_pb2.LeasedTask, report: Report
    ) -> Outcome:
        annotation = parse_request(request, self._registry, self._limits)
        with blames(annotation.annotator.id, self._engine.device.kind):
            result = await self._engine.run(
                annotation, report=lambda fetched: report(StageProgress(fetch=fetched.whole or fetched))
            )
        output = StageOutput(data=result.data, width_px=result.width_px, height_px=result.height_px)
        return Outcome(outputs=[output], spans=result.spans)
