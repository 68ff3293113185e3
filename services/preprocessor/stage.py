"""The stage `preprocess` as the lease loop sees it: leased tasks in, control images out."""

from fanlight.queue.v1 import queue_pb2
from services.kernel.errors import InvalidField
from services.kernel.pictures import PictureLimits
from services.preprocessor.engine import Engine
from services.preprocessor.registry import Registry
from services.preprocessor.wire import annotator_to_proto, parse_request
from services.worker.ports import Outcome, Output, Progress, Report


class PreprocessStage:
    """The lease loop holds a slot for every `run`."""

    name = "preprocess"

    def __init__(self, registry: Registry, engine: Engine, *, limits: PictureLimits) -> None:
        self._registry = registry
        self._engine = engine
        self._limits = limits
        # Made anew when a model comes into memory or leaves it.
        self._loaded: tuple[bool, ...] = ()
        self._capabilities = queue_pb2.Capabilities()

    def capabilities(self) -> queue_pb2.Capabilities:
        loaded = tuple(self._engine.holds(annotator) for annotator in self._registry)
        if loaded != self._loaded:
            self._loaded = loaded
            self._capabilities = queue_pb2.Capabilities(
                annotators=[annotator_to_proto(each, self._engine) for each in self._registry]
            )
        return self._capabilities

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = self._engine.device.kind

    async def run(self, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        if task.WhichOneof("work") != "annotate":
            raise InvalidField("is no work of this stage", field="work")
        control = await self._engine.run(
            parse_request(task.annotate, self._registry, self._limits),
            tell=lambda fetched: report(Progress(fetch=fetched.whole or fetched)),
        )
        output = Output(data=control.data, width_px=control.width_px, height_px=control.height_px)
        return Outcome(outputs=[output], spans=control.spans)
