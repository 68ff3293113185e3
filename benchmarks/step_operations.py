"""What a step costs beside the model: operations, waits for the device, CPU. Eight images of one sampler in a batch.

A dispatch mode counts every operation of torch, views and copies among them, of the steps after the batch's first one;
those of the UNet are left out. Nothing here depends on the machine but the CPU's time. Run:
`python -m benchmarks.step_operations [--steps 8]`.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import Report, arguments
from fanlight.contract.schedulers import SHORT_NAMES
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Generation
from services.diffusion.engine.row import Row
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan
from tests.fakes.dispatch import DispatchCount
from tests.fakes.models import make_tiny_model

ROWS = 8
SIDE_PX = 64
# A step's operations beside the UNet.
LIMIT = 40
LIMITED = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")


class StepCost(NamedTuple):
    operations: int
    syncs: int
    cpu_ms: float


class _Inner:
    """What the UNet's own work took since the last look."""

    def __init__(self, unet: Any) -> None:
        self.operations = self.syncs = 0
        self.cpu_s = 0.0
        self._forward = unet.forward

    def forward(self, *inputs: Any, **options: Any) -> Any:
        began_s = time.thread_time()
        with DispatchCount() as counted:
            output = self._forward(*inputs, **options)
        self.cpu_s += time.thread_time() - began_s
        self.operations += counted.operations
        self.syncs += counted.syncs.total()
        return output


@contextmanager
def _watched(unet: Any) -> Iterator[_Inner]:
    inner = _Inner(unet)
    unet.forward = inner.forward
    try:
        yield inner
    finally:
        del unet.forward


def costs(backend: TorchBackend, rows: Sequence[Row], *, counts: bool = True) -> list[StepCost]:
    """Of each step of the batch. `counts`: counting takes time of its own, so that either is of use."""
    made = []
    while not rows[0].is_finished:
        with _watched(rows[0].checkpoint.unet) as inner:
            began_s = time.thread_time()
            operations, syncs = _advanced(backend, rows) if counts else _timed(backend, rows)
            cpu_s = time.thread_time() - began_s - inner.cpu_s
        made.append(StepCost(max(0, operations - inner.operations), syncs - inner.syncs, cpu_s * 1000))
    return made


def _advanced(backend: TorchBackend, rows: Sequence[Row]) -> tuple[int, int]:
    with DispatchCount() as counted:
        _timed(backend, rows)
    return counted.operations, counted.syncs.total()


def _timed(backend: TorchBackend, rows: Sequence[Row]) -> tuple[int, int]:
    assert all(result.error is None for result in backend.advance(rows))
    return 0, 0


def begun(backend: TorchBackend, folder: Path, scheduler: str, steps: int, **fields: Any) -> list[Any]:
    """Eight images of different prompts."""
    checkpoint = scan([folder]).default()
    return [
        backend.begin(
            Generation(
                checkpoint=checkpoint,
                prompt=f"a cat {seed}",
                width_px=SIDE_PX,
                height_px=SIDE_PX,
                steps=steps,
                scheduler=scheduler,
                seed=seed,
                **fields,
            )
        )
        for seed in range(ROWS)
    ]


def measure(folder: Path, report: Report, *, steps: int, samplers: Sequence[str]) -> None:
    backend = TorchBackend(ModelManager(device="cpu"), threads=1)
    for name in samplers:
        later = costs(backend, begun(backend, folder, name, steps))[1:]
        goal = LIMIT if name in LIMITED else None
        report.add(name, max(cost.operations for cost in later), "", column="operations a step", goal=goal)
        report.add(name, max(cost.syncs for cost in later), "", column="waits for the device a step", goal=0)
        later = costs(backend, begun(backend, folder, name, steps), counts=False)[1:]
        report.add(name, statistics.median(cost.cpu_ms for cost in later) / ROWS, "ms", column="CPU a step and row")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args(argv)
    report = Report()
    names = [name for name in SHORT_NAMES if name != "edm_euler"]
    with tempfile.TemporaryDirectory() as folder:
        made = make_tiny_model(Path(folder) / "tiny")
        measure(made, report, steps=3 if asked.smoke else asked.steps, samplers=LIMITED[:2] if asked.smoke else names)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
