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
        # Seeds of images that are to be begun again after their first evaluation, and those that were.
        self.again: set[int] = set()
        self.begun_again: list[int] = []
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

    def begin_again(self, state: FakeRequestState) -> FakeRequestState:
        self.begun_again.append(state.generation.seed)
        return FakeRequestState(state.generation)

    def finish(self, state: FakeRequestState) -> DeviceResult:
        size = (state.generation.height_px, state.generation.width_px, 3)
        return DeviceResult(
            pixels=np.zeros(size, dtype=np.uint8), device="cpu", dtype="float32", warnings=self.warnings
        )

    def _advanced(self, state: FakeRequestState) -> StepResult:
        state.step += 1
        steps = state.generation.steps
        is_again = state.generation.seed in self.again
        self.again.discard(state.generation.seed)
        return StepResult(
            progress=StepProgress(step=state.step, steps=steps),
            is_finished=state.step == steps and not is_again,
            is_again=is_again,
            error=self.errors.get(state.generation.seed),
        )
