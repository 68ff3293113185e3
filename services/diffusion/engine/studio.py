"""The work on the device, with torch. For the device thread."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch

from fanlight.errors import FanlightError
from services.diffusion.engine.controls import Conditions, control_rows
from services.diffusion.engine.decode import are_sound, decode, gave_nan, preview
from services.diffusion.engine.evaluate import Said, predict
from services.diffusion.engine.ports import Advance, Canvas, DeviceLost, Finished, Progress
from services.diffusion.engine.rows import Row
from services.diffusion.engine.safety import SafetyChecker
from services.diffusion.engine.shortage import Relief, no_room
from services.diffusion.engine.strict import bits_repeat
from services.diffusion.engine.threads import Threads
from services.diffusion.generation import Generation, Safety
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.models.library import Library
from services.diffusion.models.shortage import NoRoom, noticed
from services.diffusion.pictures.png import encode_png
from services.diffusion.prompt.kept import Prompts


@contextmanager
def _not_lost() -> Iterator[None]:
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceLost("the worker's device failed; its process starts anew") from error


class TorchStudio:
    def __init__(self, library: Library, *, threads: int, safety: SafetyChecker | None = None) -> None:
        """`threads`: 0 chooses by the work, see `Threads`."""
        self._safety = safety or SafetyChecker(None)
        self._library = library
        self._threads = Threads(threads)
        self._prompts = Prompts()
        self._conditions = Conditions()
        self._relief = Relief(self._release)

    @_not_lost()
    def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry]) -> None:
        work = partial(self._library.checkpoint, checkpoint, controlnets)
        self._relief.once_more(work, "load these models", field="model")

    @_not_lost()
    @torch.inference_mode()
    def begin(self, generation: Generation) -> Row:
        return self._relief.once_more(lambda: self._begun(generation), "begin this picture")

    def _begun(self, generation: Generation) -> Row:
        checkpoint = self._library.assembled(generation)
        self._threads.suit(generation, checkpoint)
        with bits_repeat(generation.strict):
            prompts = self._prompts.get(generation, checkpoint)
            controls = control_rows(generation, checkpoint, list(checkpoint.nets), self._conditions)
            return Row(generation, checkpoint, prompts, controls)

    @_not_lost()
    @torch.inference_mode()
    def advance(self, canvases: Sequence[Canvas]) -> list[Advance]:
        rows = cast(Sequence[Row], canvases)
        self._threads.suit(rows[0].generation, rows[0].checkpoint)
        with bits_repeat(rows[0].generation.strict):
            errors = [_step(row, said) for row, said in zip(rows, predict(rows, self._relief), strict=True)]
            left = [row for row, error in zip(rows, errors, strict=True) if error is None]
            checked = self._relief.once_more(lambda: are_sound(left), "check these pictures")
            sound = dict(zip(map(id, left), checked, strict=True))
            return [
                _advanced(row, error or (None if sound[id(row)] else gave_nan(row)))
                for row, error in zip(rows, errors, strict=True)
            ]

    @_not_lost()
    @torch.inference_mode()
    def finish(self, canvas: Canvas) -> Finished:
        row = cast(Row, canvas)
        return self._relief.once_more(lambda: self._finished(row), "finish a picture of this size")

    def _finished(self, row: Row) -> Finished:
        checkpoint = row.checkpoint
        with bits_repeat(row.generation.strict):
            pixels = decode(row)
        nsfw = None
        if row.generation.safety_checker is not Safety.OFF:
            pixels, nsfw = self._safety.checked(pixels, row.generation.safety_checker, self._library)
        return Finished(pixels=pixels, nsfw=nsfw, device=self._library.device_name, dtype=str(checkpoint.dtype)[6:])

    def _release(self) -> None:
        """Off the device with all that no picture at hand uses."""
        self._prompts.clear()
        self._conditions.clear()
        self._library.release()


def _step(row: Row, said: Said) -> FanlightError | None:
    """What keeps this row from going on. A step that found no room half way cannot be taken again."""
    if isinstance(said, FanlightError):
        return said
    try:
        with noticed():
            row.advance(said)
    except NoRoom:
        return no_room("take a step of this picture")
    return None


def _advanced(row: Row, error: FanlightError | None) -> Advance:
    image = b""
    try:
        with noticed():
            image = encode_png(preview(row)) if error is None and _wants_preview(row) else b""
    except NoRoom:
        # A picture without a preview is better than none.
        pass
    except FanlightError as reason:
        error = reason
    progress = Progress(step=row.index, steps=row.evaluations, preview=image)
    return Advance(progress=progress, is_finished=row.is_finished, error=error)


def _wants_preview(row: Row) -> bool:
    every = row.generation.preview_every_steps
    return bool(every) and row.index % every == 0 and not row.is_finished
