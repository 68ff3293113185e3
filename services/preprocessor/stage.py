"""The stage `preprocess` as the lease loop sees it: leased tasks in, control images out."""

from fanlight.queue.v1 import queue_pb2
from services.kernel.errors import InvalidField
from services.kernel.pictures import PictureLimits
from services.preprocessor.engine import Engine
from services.preprocessor.registry import Registry
from services.preprocessor.wire import annotator_to_proto, parse_request
from services.worker.ports import Outcome, Output, Report

DEVICE = "cpu"


class PreprocessStage:
    """The lease loop holds a slot for every `run`."""

    name = "preprocess"

    def __init__(self, registry: Registry, engine: Engine, *, limits: PictureLimits) -> None:
        self._registry = registry
        self._engine = engine
        self._limits = limits
        self._capabilities = queue_pb2.Capabilities(annotators=map(annotator_to_proto, registry))

    def capabilities(self) -> queue_pb2.Capabilities:
        return self._capabilities

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = DEVICE

    async def run(self, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        if task.WhichOneof("work") != "annotate":
            raise InvalidField("is no work of this stage", field="work")
        control = await self._engine.run(parse_request(task.annotate, self._registry, self._limits))
        output = Output(data=control.data, width_px=control.width_px, height_px=control.height_px)
        return Outcome(outputs=[output], spans=control.spans)
