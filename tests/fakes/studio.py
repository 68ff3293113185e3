"""A studio without a device: counts evaluations, and waits where a test says so."""

import threading
from collections.abc import Sequence

import numpy as np

from services.diffusion.engine.ports import Advance, Finished, Progress
from services.diffusion.generation import Generation
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry


class FakeCanvas:
    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.step = 0


class FakeStudio:
    """Pictures are black. `gate`, closed by a test, holds every evaluation until it is opened for one or for good."""

    def __init__(self) -> None:
        # The seeds of every batch, in order.
        self.batches: list[list[int]] = []
        self.loaded: list[str] = []
        self.errors: dict[int, Exception] = {}
        self.batch_errors: list[Exception] = []
        self.gate: threading.Semaphore | None = None

    def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry]) -> None:
        self.loaded.append(checkpoint.id)

    def begin(self, generation: Generation) -> FakeCanvas:
        return FakeCanvas(generation)

    def advance(self, canvases: Sequence[FakeCanvas]) -> list[Advance]:
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        self.batches.append([canvas.generation.seed for canvas in canvases])
        if self.batch_errors:
            raise self.batch_errors.pop(0)
        return [self._advanced(canvas) for canvas in canvases]

    def finish(self, canvas: FakeCanvas) -> Finished:
        size = (canvas.generation.height_px, canvas.generation.width_px, 3)
        return Finished(pixels=np.zeros(size, dtype=np.uint8), device="cpu", dtype="float32")

    def _advanced(self, canvas: FakeCanvas) -> Advance:
        canvas.step += 1
        steps = canvas.generation.steps
        return Advance(
            progress=Progress(step=canvas.step, steps=steps),
            is_finished=canvas.step == steps,
            error=self.errors.get(canvas.generation.seed),
        )
