"""Small values for the scheduler: workers that hold checkpoint `a`, and tasks for it."""

from collections.abc import Mapping
from typing import Any

from services.gateway.scheduler.pace import USUAL_SIZE_CLASS
from services.gateway.scheduler.queue import TaskKind, WaitingTask
from services.gateway.scheduler.workers import WorkerView

GB = 10**9


class Sizes(dict[str, int]):
    """Checkpoints have a gigabyte, LoRAs, whose names begin with l, a tenth of that."""

    def get(self, model: str, default: Any = None) -> int:
        return GB // 10 if model.startswith("l") else GB


SIZES: Mapping[str, int] = Sizes()


def kind_of(checkpoint: str, *loras: str) -> TaskKind:
    return TaskKind(
        stage="diffusion",
        needs=frozenset([f"checkpoint:{checkpoint}", *(f"lora:{lora}" for lora in loras)]),
        checkpoint=checkpoint,
        models=frozenset([checkpoint, *loras]),
        loras=tuple((lora, 1.0) for lora in loras),
    )


A, B = kind_of("a"), kind_of("b")
OFFERS = frozenset(["checkpoint:a", "checkpoint:b", "lora:l", *(f"lora:l{i}" for i in range(64))])


def a_view(name: str = "w", *, step_s: float = 0.2, **changes: Any) -> WorkerView:
    """`step_s`: the time of one evaluation, whatever the family and size."""
    values: dict[str, Any] = {
        "node": f"node-{name}",
        "stage": "diffusion",
        "offers": OFFERS,
        "held": frozenset({"a"}),
        "sizes": SIZES,
        "link_bps": 100e6,
        "step_times": {("", USUAL_SIZE_CLASS): step_s},
        "takes_fetches": True,
    }
    return WorkerView(id=name, **{**values, **changes})


def a_task(name: str, *, kind: TaskKind = A, rank_s: float = 0.0, steps: int = 20, **changes: Any) -> WaitingTask:
    return WaitingTask(key=(name, 1), kind=kind, rank_s=rank_s, queue_time_s=0.0, steps=steps, **changes)
