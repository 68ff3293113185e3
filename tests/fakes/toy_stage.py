"""A stage that makes a string upper case: adding a stage to a worker takes a request message and such a class."""

from google.protobuf import wrappers_pb2

from fanlight.errors import InvalidField
from fanlight.queue.v1 import queue_pb2
from services.worker.ports import Outcome, Report, StageOutput, StageProgress

LENGTH_MAX = 1_000


class UppercaseStage:
    name = "uppercase"
    request_type = wrappers_pb2.StringValue

    def __init__(self) -> None:
        self._capabilities = queue_pb2.Capabilities(
            offers=["uppercase"], limits=[queue_pb2.Limit(name="characters", maximum=LENGTH_MAX)]
        )

    def capabilities(self) -> queue_pb2.Capabilities:
        return self._capabilities

    def describe(self, worker: queue_pb2.Worker) -> None:
        worker.device = "cpu"

    async def run(self, request: wrappers_pb2.StringValue, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        if not request.value:
            raise InvalidField("is empty; send the text", field="value")
        report(StageProgress(step=1, steps=1))
        return Outcome(outputs=[StageOutput(data=request.value.upper().encode(), width_px=0, height_px=0)])
