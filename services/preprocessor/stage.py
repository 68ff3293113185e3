"""The stage `preprocess` as the lease loop sees it: leased tasks in, control images out."""

from functools import cached_property

from fanlight.contract.needs import PIXELS
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.kernel.pictures import PictureLimits
from services.preprocessor.engine import Engine
from services.preprocessor.registry import Registry
from services.preprocessor.wire import annotator_to_proto, parse_request
from services.worker.ports import Outcome, Output, Progress, Report


class PreprocessStage:
    """The lease loop holds a slot for every `run`."""

    name = "preprocess"
    request_type = preprocessor_pb2.AnnotateRequest

    def __init__(self, registry: Registry, engine: Engine, *, limits: PictureLimits) -> None:
        self._registry = registry
        self._engine = engine
        self._limits = limits

    def capabilities(self) -> queue_pb2.Capabilities:
        return self._capabilities

    @cached_property
    def _capabilities(self) -> queue_pb2.Capabilities:
        """Made when the first poll asks: it reads the manifests of weights, which direct calls may never need."""
        return queue_pb2.Capabilities(
            annotators=[annotator_to_proto(each, self._engine) for each in self._registry],
            limits=[queue_pb2.Limit(name=PIXELS, maximum=self._limits.pixels)],
        )

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = self._engine.device.kind
        # With their kind: ControlNets have the same ids.
        worker.ram_models[:] = [f"annotator:{each.id}" for each in self._registry if self._engine.holds(each)]

    async def run(
        self, request: preprocessor_pb2.AnnotateRequest, task: queue_pb2.LeasedTask, report: Report
    ) -> Outcome:
        control = await self._engine.run(
            parse_request(request, self._registry, self._limits),
            tell=lambda fetched: report(Progress(fetch=fetched.whole or fetched)),
        )
        output = Output(data=control.data, width_px=control.width_px, height_px=control.height_px)
        return Outcome(outputs=[output], spans=control.spans)
