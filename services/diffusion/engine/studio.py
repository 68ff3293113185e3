"""The work on the device, with torch. For the device thread."""

from collections.abc import Sequence
from typing import cast

import torch

from services.diffusion.engine.controls import Conditions, control_rows
from services.diffusion.engine.decode import check_sound, decode, preview
from services.diffusion.engine.evaluate import predict
from services.diffusion.engine.ports import Advance, Canvas, Finished, Progress
from services.diffusion.engine.rows import Row
from services.diffusion.engine.safety import SafetyChecker
from services.diffusion.engine.strict import bits_repeat
from services.diffusion.engine.threads import Threads
from services.diffusion.generation import Generation, Safety
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.models.library import Library
from services.diffusion.pictures.png import encode_png
from services.diffusion.prompt.kept import Prompts
from services.kernel.errors import FanlightError, ResourceExhausted


class TorchStudio:
    def __init__(self, library: Library, *, threads: int, safety: SafetyChecker | None = None) -> None:
        """`threads`: 0 chooses by the work, see `Threads`."""
        self._safety = safety or SafetyChecker(None)
        self._library = library
        self._threads = Threads(threads)
        self._prompts = Prompts()
        self._conditions = Conditions()

    def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry]) -> None:
        self._library.checkpoint(checkpoint, controlnets)

    @torch.inference_mode()
    def begin(self, generation: Generation) -> Row:
        checkpoint = self._library.assembled(generation)
        self._threads.suit(generation, checkpoint)
        try:
            with bits_repeat(generation.strict):
                prompts = self._prompts.get(generation, checkpoint)
                controls = control_rows(generation, checkpoint, list(checkpoint.nets), self._conditions)
                return Row(generation, checkpoint, prompts, controls)
        except torch.OutOfMemoryError as error:
            raise ResourceExhausted("the device has no room to begin this picture", field="width_px") from error

    @torch.inference_mode()
    def advance(self, canvases: Sequence[Canvas]) -> list[Advance]:
        rows = cast(Sequence[Row], canvases)
        self._threads.suit(rows[0].generation, rows[0].checkpoint)
        with bits_repeat(rows[0].generation.strict):
            predictions = predict(rows)
            return [_advanced(row, prediction) for row, prediction in zip(rows, predictions, strict=True)]

    @torch.inference_mode()
    def finish(self, canvas: Canvas) -> Finished:
        row = cast(Row, canvas)
        checkpoint = row.checkpoint
        with bits_repeat(row.generation.strict):
            pixels = decode(row)
        nsfw = None
        if row.generation.safety is not Safety.OFF:
            pixels, nsfw = self._safety.checked(pixels, row.generation.safety, checkpoint.device)
        return Finished(pixels=pixels, nsfw=nsfw, device=self._library.device_name, dtype=str(checkpoint.dtype)[6:])


def _advanced(row: Row, prediction: torch.Tensor) -> Advance:
    row.advance(prediction)
    error, image = None, b""
    try:
        check_sound(row)
        image = encode_png(preview(row)) if _wants_preview(row) else b""
    except FanlightError as reason:
        error = reason
    progress = Progress(step=row.index, steps=row.evaluations, preview=image)
    return Advance(progress=progress, is_finished=row.is_finished, error=error)


def _wants_preview(row: Row) -> bool:
    every = row.generation.preview_every_steps
    return bool(every) and row.index % every == 0 and not row.is_finished
