"""A backend without a device: counts evaluations, and waits where a test says so."""

import threading
from collections.abc import Sequence

import numpy as np

from services.diffusion.engine.generation import Generation
from services.diffusion.engine.ports import DeviceResult, StepProgress, StepResult
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry


class FakeRequestState:
    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.step = 0


class FakeBackend:
    """Images are black. `gate`, closed by a test, holds every evaluation until it is opened for one or for good."""

    def __init__(self) -> None:
        # The seeds of every batch, in order.
        self.batches: list[list[int]] = []
        self.loaded: list[str] = []
        self.errors: dict[int, Exception] = {}
        self.batch_errors: list[Exception] = []
        self.gate: threading.Semaphore | None = None
        self.warnings: tuple[str, ...] = ()

    def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry]) -> None:
        self.loaded.append(checkpoint.id)

    def begin(self, generation: Generation) -> FakeRequestState:
        return FakeRequestState(generation)

    def advance(self, states: Sequence[FakeRequestState]) -> list[StepResult]:
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        self.batches.append([state.generation.seed for state in states])
        if self.batch_errors:
            raise self.batch_errors.pop(0)
        return [self._advanced(state) for state in states]

    def finish(self, state: FakeRequestState) -> DeviceResult:
        size = (state.generation.height_px, state.generation.width_px, 3)
        return DeviceResult(
            pixels=np.zeros(size, dtype=np.uint8), device="cpu", dtype="float32", warnings=self.warnings
        )

    def _advanced(self, state: FakeRequestState) -> StepResult:
        state.step += 1
        steps = state.generation.steps
        return StepResult(
            progress=StepProgress(step=state.step, steps=steps),
            is_finished=state.step == steps,
            error=self.errors.get(state.generation.seed),
        )
